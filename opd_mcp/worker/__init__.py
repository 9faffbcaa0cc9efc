"""The background process of a run: device lease, phases, journal.

May import planning and what is below it; `main` and `stage_calls` alone load the engine, once the lease is held.
"""
