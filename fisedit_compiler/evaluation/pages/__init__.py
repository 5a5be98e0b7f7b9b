"""Tables, curves and pages of results.

Every figure comes from ``results/``; none is measured here. May import what the room ``evaluation`` may.
"""
