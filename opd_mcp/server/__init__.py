"""The face: MCP tools, their texts, the app and its transports.

May import schemas, store and jobs; never torch, transformers or the engine.
"""
