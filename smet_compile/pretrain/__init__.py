"""Pre-trains a model from the command line: data, the loop and its report."""
