<<<<<<< HEAD
"""What the paper has not: one file each, run as python -m beyond.NAME."""
=======
"""What the paper does not have: each file is one addition to the core, and runs alone."""
>>>>>>> model
