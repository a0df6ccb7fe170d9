"""Kernels behind the ops, one folder per kind. Importing this package imports none of them."""
