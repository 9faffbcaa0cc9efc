"""Teachers: who gives log-probs of tokens that a student sampled.

May import schemas, torch and the engine's models and data.
"""
