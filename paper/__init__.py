"""Short scripts for tables 1 and 3 to 7, figures 2 to 8: python -m paper.figure2_residual"""
