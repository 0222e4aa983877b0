"""Looking at what a network makes."""
