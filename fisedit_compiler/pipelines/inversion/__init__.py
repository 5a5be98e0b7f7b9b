"""An editable generation of a picture that no model made.

It is made here, not edited (``editing/``). May import what the room ``pipelines`` may.
"""
