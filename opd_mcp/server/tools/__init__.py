"""The MCP tools: `table.py` lists them all, one file per group; `spec.py` says what a row is.

Knows the service and the texts, and nothing of mcp.
"""
