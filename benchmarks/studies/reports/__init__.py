"""Writes what each study found from its records: a page of markdown and its figures."""
