"""opd-mcp: give an agent two model names and some prompts; it gets back a distilled student and the evidence.

The layers and the map of the code are in AGENTS.md; `tests/test_layers.py` proves the layers.
"""

__version__ = "0.2.0"
