"""Random bad input from a seed: each must give a valid result or one clear error."""
