"""The engine on one CUDA device: check.py is the script, the other files are its parts."""
