"""The folder of an evaluation and what is computed from it."""
