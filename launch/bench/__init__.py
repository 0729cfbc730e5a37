"""Measures how fast a model is decoded, prefilled and served: on a checkpoint, or on any OpenAI-compatible server."""
