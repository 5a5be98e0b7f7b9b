"""The rewrite passes, one kind of operation a file."""
