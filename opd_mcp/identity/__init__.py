"""Who is who: hashes of weights, tokenizers, templates and data; lineage; the consistency rule.

May import schemas and the standard library (Parquet readers import pyarrow when called).
"""
