"""What is measured, one file each: ``tables(settings)`` measures and returns its tables."""
