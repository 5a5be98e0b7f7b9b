"""How one call of a program runs: hoisted values, eager and CUDA graphs, dense calls, copies.

It knows one call and no run: modes and what they remember are ``sessions/``'s. May import what the room ``runtime``
may.
"""
