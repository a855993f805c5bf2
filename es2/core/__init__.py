"""What every package stands on: errors, whole-or-absent files, settings, progress, versions, the process pool."""
