"""The rewrite passes, one kind of operation a file.

A pass knows its own kind of operation and no other pass's; order and loop are ``order.py`` and ``rewriting.py`` of
``passes``. May import what the room ``passes`` may.
"""
