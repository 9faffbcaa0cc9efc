"""What can be read of a workspace: status, metrics, logs, dashboard, caches, artifacts, setup.

May import supervisor, planning and what is below them; changes no run.
"""
