"""Flow matching: the path from noise to data, the losses on it, and the solvers along it. No parameters here."""
