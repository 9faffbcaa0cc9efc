"""What this machine has, and who holds it: hardware, device leases, settings.

May import schemas, identity and store.
"""
