"""Benchmarks and peers: `python -m scripts.bench --help`, and `python -m scripts.bench.gpu_check` on a GPU."""
