"""The teacher cache: Parquet shards with exact tokens and log-probs, and the manifest that proves what they are.

May import schemas, identity, numpy and the engine's data; pyarrow only inside functions.
"""
