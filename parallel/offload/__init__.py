"""Weights that live in host memory or in the checkpoint's file, and the cache that brings them in. One rank."""
