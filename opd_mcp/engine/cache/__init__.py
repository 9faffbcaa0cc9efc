"""The teacher cache: Parquet shards with exact tokens and log-probs, and the manifest that proves what they are.

May import schemas, identity, numpy, the engine's data, and in `convert` its models; pyarrow only inside functions.
"""
