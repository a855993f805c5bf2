"""Geometry, probes, layers, projections, verdict and comparison, in numpy and scipy alone."""
