"""Fits sparse training into other training tools; each file imports its tool, and is imported by itself."""
