"""From noise to images: settings, solvers, guidance, and pictures on disk."""
