"""Prompts and responses as people have them: which files a path means, their raw rows, their shape, typed rows.

`sources` → `formats` → `shapes` → `reading` (all rows) or `scan` (what a plan needs, in one pass and bounded memory).
"""
