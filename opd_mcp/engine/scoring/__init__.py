"""Scoring: a teacher's log-probs of the tokens that a student sampled, by a teacher here or at a URL; its server.

May import schemas, identity, torch and the engine's models, losses and data; httpx2, starlette, uvicorn in functions.
"""
