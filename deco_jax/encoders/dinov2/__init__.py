"""DINOv2 and its weight files."""
