"""The graphs made from a rewritten one: recording, step and update, hoisted bundles, maps.

No operation is rewritten here (``rewrites/``). May import what the room ``passes`` may.
"""
