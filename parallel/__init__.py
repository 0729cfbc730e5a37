"""The sharded model and what drives it. Knows nothing of the command line."""
