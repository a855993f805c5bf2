"""Prompt sets: labels, splits, file readers, published benchmarks, near-duplicates, the built-in pairs. No torch."""
