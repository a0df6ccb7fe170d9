"""What each study found, written from its records: a page of markdown and its figures."""
