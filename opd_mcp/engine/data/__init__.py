"""Data as tensors: prompts to token ids, sequences in flat arrays, packed batches.

May import schemas, identity, numpy, torch and transformers' tokenizers.
"""
