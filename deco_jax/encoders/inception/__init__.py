"""The TensorFlow Inception-v3 of 2015, through which FID and its relatives are defined."""
