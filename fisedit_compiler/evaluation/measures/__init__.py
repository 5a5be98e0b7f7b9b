"""What pictures are measured by, and what must hold of the figures.

No edit is made here (``methods/``) and nothing is written (``results/``). May import what the room ``evaluation`` may.
"""
