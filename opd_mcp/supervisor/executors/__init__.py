"""Executors: where a run's worker is started. `local` on this machine; `slurm`, `ray` and `ssh` on others.

Files are the only protocol: the same worker command, the run's directory on a shared file system. May import what
`supervisor` may.
"""
