"""Answers as short texts for agents and for the command line; one file a concept.

Knows the schemas, and nothing of mcp or of the workspace; programs read the structured answers instead.
"""
