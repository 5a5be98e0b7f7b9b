"""From a lowered graph to Inductor's code: the graph handed over as it is, the kernels of its ops compiled meanwhile,
and how a later process finds both on disk.

May import what ``lowering`` may.
"""
