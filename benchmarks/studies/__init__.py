"""Studies of the method itself: many small training runs, one factor at a time. `python -m benchmarks.studies NAME`."""
