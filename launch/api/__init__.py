"""The OpenAI-compatible HTTP front end. Sees the engine only as generate(Request) -> stream of Token."""
