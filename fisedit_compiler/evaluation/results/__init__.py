"""The folder of an evaluation and what is computed from it.

What is measured of one pair is ``measures/``'s, what people read is ``pages/``'s. May import what the room
``evaluation`` may.
"""
