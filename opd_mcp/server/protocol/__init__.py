"""Between the SDK and the tools: specs, arguments, JSON schemas, elicitation, tasks, waiting.

Knows MCP, and nothing of what a tool does.
"""
