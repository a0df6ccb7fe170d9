"""Holds the sections, one file each: ``tables(settings)`` measures and returns its tables."""
