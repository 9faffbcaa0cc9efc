"""The hands: plans and estimates, device leases, detached launch, supervision, the worker.

May import schemas, identity and store; only worker.py imports engine, and only once it holds a lease.
"""
