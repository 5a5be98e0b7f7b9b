"""What a mode does with the calls of a run: recording, editing, checking.

How one call runs is ``execution/``'s. May import what the room ``runtime`` may.
"""
