"""What keeps a workspace in order: doctor and gc.

May import the service and what is below it.
"""
