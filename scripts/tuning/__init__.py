"""The search behind scripts.tune: its space, trials, pruning, Pareto front, validation and files. No Hydra."""
