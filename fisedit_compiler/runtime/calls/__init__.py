"""From arguments to a call, and to the program that serves it.

What the call does is ``execution/``'s, what a mode does with it ``sessions/``'s. May import what the room ``runtime``
may.
"""
