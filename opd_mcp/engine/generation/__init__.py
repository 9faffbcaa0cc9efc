"""Sampling from a model: bulk, left-padded, with exact log-probs of every drawn token.

May import schemas, torch and the engine's models and data.
"""
