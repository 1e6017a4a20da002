"""Side-by-side measurements against the peers; `python -m benchmarks` runs them all."""
