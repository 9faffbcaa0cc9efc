"""The vocabulary: recipes, plans, run records, reports, identities and errors, as strict pydantic models.

May import pydantic and the standard library only; every other layer may import it.
"""
