"""Sparse operators; each folder holds ``naive`` (the truth) and the fast versions that are tested against it."""
