"""Batch templates, as package data. Empty so far: no command reaches it."""
