"""How turns become ids: the chat template rendered, text encoded, what SFT learns of a row, all without transformers.

The engine and the plan's preview share this folder, so that a plan shows what a run does. Loads jinja2 and tokenizers.
"""
