"""One edit or several, from checked arguments to results."""
