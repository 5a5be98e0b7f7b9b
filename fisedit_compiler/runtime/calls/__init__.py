"""From arguments to a call, and to the program that serves it."""
