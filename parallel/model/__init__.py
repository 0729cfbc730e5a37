"""One rank's share of gpt-oss: from safetensors to logits. Pure functions over frozen values."""
