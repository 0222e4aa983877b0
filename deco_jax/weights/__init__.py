"""Tensors in the files of others: reading them without executing anything, and giving them our names."""
