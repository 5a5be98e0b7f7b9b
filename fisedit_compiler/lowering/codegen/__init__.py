"""From a lowered graph to code: Inductor gets the graph, its ops' kernels are compiled meanwhile, both stay on disk.

Only what is compiled, and how, is decided here; the graph comes from ``lowering`` as it is. May import what the room
``lowering`` may.
"""
