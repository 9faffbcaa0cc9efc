"""What keeps a workspace well: doctor and gc.

May import the service and what is below it.
"""
