"""Building a teacher cache so that it survives its process: rollouts and scores, shard by shard.

May import schemas, identity and all of the engine but its stages.
"""
