"""From a module to a graph: what it is, what its calls look like, the export, and the cache on disk."""
