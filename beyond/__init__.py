"""What the paper has not: one file each, run as python -m beyond.NAME."""
