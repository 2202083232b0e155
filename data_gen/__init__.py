"""Engine and task (and scorer) in, rows out."""
