"""Weights to and from the PyTorch system's names and shapes."""
