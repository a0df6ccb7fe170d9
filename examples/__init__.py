"""Programs that show how the library is used; each runs by itself, and tests and studies import their parts."""
