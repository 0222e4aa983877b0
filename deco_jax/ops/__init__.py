"""Which program computes an operation here? One table of implementations per operation, the plain one last."""
