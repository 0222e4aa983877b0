"""A page on which people draw images with a trained network."""
