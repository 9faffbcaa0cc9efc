"""Training: the optimizer, the loop shared by SFT and both distillation methods, its steps, watches and checkpoints.

May import schemas, identity, torch and the engine's data, losses and models.
"""
