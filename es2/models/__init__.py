"""Models: names, files, loading, adapters, chat templates, batching, forward passes, replies, KL through the head."""
