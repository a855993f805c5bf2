"""What a command and a job both do, from a model and prompts to artifacts on disk."""
