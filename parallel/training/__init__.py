"""Fine-tuning through packed MXFP4 weights. Empty so far: no command reaches it."""
