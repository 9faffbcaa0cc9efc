"""The face: MCP tools, their texts, the app and its transports.

May import the service, views and what is below them; never torch, transformers or the engine.
"""
