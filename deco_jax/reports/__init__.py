"""A page about runs that people look at."""
