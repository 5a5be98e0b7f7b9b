"""The ways to edit that are compared."""
