"""Models as the engine sees them: loading, saving, and logits of chosen rows.

May import schemas, identity, torch and transformers.
"""
