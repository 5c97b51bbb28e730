"""Loading of checkpoints, family adapters and the decoding step. The only package that imports transformers."""
