"""Training: the optimizer, the loop shared by SFT and both distillation methods, and their batches.

May import schemas, torch and the engine's data, losses, models, generation and teachers.
"""
