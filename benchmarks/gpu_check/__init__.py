"""Makes the most of a short time on a GPU: one command that checks and measures, and one that writes the record."""
