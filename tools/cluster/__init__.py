"""A real Slurm with two nodes, a real sshd and a real Ray with two nodes on loopback, and runs on them."""
