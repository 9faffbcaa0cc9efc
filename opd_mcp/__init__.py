"""opd-mcp: give an agent two model names and some prompts; it gets back a distilled student and the evidence.

The layers, from the bottom: schemas, identity, then engine and store, then jobs, then server.
"""

__version__ = "0.1.0"
