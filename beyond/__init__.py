"""What the paper does not have: each file is one addition to the core, and runs alone."""
