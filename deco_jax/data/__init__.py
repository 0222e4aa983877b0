"""Labelled images: where they come from, how they are cropped, and the order in which they reach the devices."""
