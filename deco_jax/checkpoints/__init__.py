"""A run's checkpoints: writing and reading them, and what may resume from which."""
