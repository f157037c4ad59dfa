"""One short script for each table and figure of the paper: python -m paper.figure2_residual"""
