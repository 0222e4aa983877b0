"""Checkpoints of a run: what is in one and how it is read (`store`), and what may go on from it (`resume`)."""
