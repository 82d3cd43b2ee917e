"""Fair comparisons: one base run, many models, every finished cell stored at once."""
