"""The ES2 fine-tune: objective, sampling, validation, checkpoints, the loop."""
