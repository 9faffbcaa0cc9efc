"""The background process of a run: device lease, phases, journal.

May import planning and what is below it; `main`, `stage_calls` and the processes of `teams` alone load the engine, once
the lease is held.
"""
