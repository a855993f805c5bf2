"""ES2 Workbench: where inside a language model are harmful and harmless prompts told apart, how far apart are they,
and what does Embedding Space Separation fine-tuning (arXiv 2603.20206) do to that?

This package is the library and the command line; `app/` draws what it leaves on disk. Importing it imports nothing
heavy: torch, transformers and TransformerLens are loaded by the jobs that need them, never by the app.
"""

__version__ = "0.1.0"
