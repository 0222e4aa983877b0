"""The version, where tools can read it without importing JAX."""

__version__ = "0.1.0"
