"""How good are generated images? Mergeable metrics of a feature network's outputs, and what they are compared with."""
