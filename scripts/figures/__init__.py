"""One module per kind of figure; `scripts.plots` writes them all."""
