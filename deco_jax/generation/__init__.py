"""Many images from trained networks: folders of pictures, and shards for evaluation."""
