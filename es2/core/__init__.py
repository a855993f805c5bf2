"""The base of every package: errors, whole-or-absent files, settings, progress, versions, the process pool."""
