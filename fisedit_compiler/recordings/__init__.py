"""What runs leave behind: slots, turns of edits that share them, and copies of inputs.

How a value is recorded is for its kind to say (``slots/``); nothing here runs a program. May import ``lowering`` and
the rooms below.
"""
