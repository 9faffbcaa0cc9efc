"""Kills, full disks, damage and contention against the real product: run.py is the test, the rest are its parts."""
