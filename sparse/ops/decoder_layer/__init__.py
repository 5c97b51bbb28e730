"""Halves of a decoder layer for the few rows of a step."""
