"""Objectives: the loss of each response token as a function of its own row of logits, and the weights of tokens.

May import schemas and torch only.
"""
