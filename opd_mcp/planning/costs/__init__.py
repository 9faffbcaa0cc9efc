"""What a run needs of the machine, and whether it gets it: operations, memory, seconds, quotas.

May import schemas, identity, store and devices.
"""
