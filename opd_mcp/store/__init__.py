"""The memory: workspace, run directories and journals, the SQLite index, artifacts.

May import schemas and identity; never torch, mcp or the engine.
"""
