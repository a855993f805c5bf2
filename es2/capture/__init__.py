"""The residual stream, read through hooks into activation sets, in one process or several."""
