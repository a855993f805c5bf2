"""What `import es2` offers: thin functions over `es2.workflow`, and records that become tables and figures.

`es2/__init__.py` loads a name when it is first used. Nothing here imports torch or pandas before a function needs it.
"""
