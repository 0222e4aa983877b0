"""What goes to PyTorch users: DeCo in PyTorch, in one file, and a diffusers pipeline around it."""
