"""Gated feed-forward networks that compute only the channels with a strong gate."""
