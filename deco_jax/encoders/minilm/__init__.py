"""MiniLM, a small text encoder that installs from PyPI: for trials on a CPU, not the published system's."""
