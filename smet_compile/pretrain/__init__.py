"""Pre-training from the command line: presets, data, the loop and its report."""
