"""From a caller's arguments to a judged run request: references, phases, checks, estimates, quotas.

May import schemas, identity, store and devices; never torch, mcp, the engine or a worker.
"""
