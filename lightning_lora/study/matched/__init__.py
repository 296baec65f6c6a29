"""Matched studies: arms that differ in one thing only, each at its own best learning rate, with several seeds.

Read in this order: `record` (what a study folder holds, and `read_study`).
"""
