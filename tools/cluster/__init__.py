"""A real Slurm with two nodes and a real sshd on loopback, and runs on them."""
