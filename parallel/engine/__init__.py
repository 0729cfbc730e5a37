"""Requests in, tokens out: the cache, the sampler, the loop over steps, and the rank's entry point."""
