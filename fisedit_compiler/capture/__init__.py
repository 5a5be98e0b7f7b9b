"""From a module to a graph: what it is, what its calls look like, the export, and the cache on disk.

The graph is captured as the module computes it; nothing is rewritten here (``passes/``). May import ``kernels`` and the
rooms below.
"""
