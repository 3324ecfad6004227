"""Benchmarks on a checkpoint through lm-eval: the call, what a benchmark folder holds, every item's outcome."""
