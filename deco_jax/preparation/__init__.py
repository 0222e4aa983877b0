"""What never changes about the images, computed once and stored: `deco prepare`."""
