"""The evidence: answers, accuracy with intervals, exact reverse KL on fresh samples.

May import schemas, identity, torch and the engine's models, data and generation.
"""
