"""Programs over stored results and over run.py."""
