"""Weights that live in host memory and the cache that brings them in. Empty so far: the planner says so."""
