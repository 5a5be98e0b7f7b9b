"""What programs are written in: sizes, specs, layouts, signatures of calls, listings.

No graph is rewritten here (``passes/``) and none is run. May import ``masks``, ``models`` and the rooms below.
"""
