"""Activation sets on disk and what is derived from them. No torch."""
