"""Images with a label or a caption: where they are, how they are cropped, and in which order devices get them."""
