"""Attention of a step's rows to a few KV blocks, the unfinished block and the step's own tokens."""
