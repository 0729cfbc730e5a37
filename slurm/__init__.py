"""Batch templates, as package data: one frame for every job, and what a node runs in each kind of job.

`launch/slurm_script.py` fills them in. Words between at signs, as in `@NAME@`, are what it replaces.
"""
