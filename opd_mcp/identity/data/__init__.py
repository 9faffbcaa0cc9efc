"""Prompts and responses as people have them: which files a path means, their raw rows, their shape, typed rows.

`sources` → `formats` and `tables` → `shapes` → `reading` (all rows) or `scan` (what a plan needs, in bounded memory);
`rows` holds what passes between them.
"""
