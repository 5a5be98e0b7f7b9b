"""Which edits are made: pairs of prompts, written by hand or by a grammar.

No picture is made here; ``objects.py`` finds objects in pictures that are there. May import what the room
``evaluation`` may.
"""
