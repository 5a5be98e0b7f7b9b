"""The samples of a batch: which axis counts them, and how some are computed alone and put together with recorded ones.

What a call computes of them is ``execution/``'s. May import what the room ``runtime`` may.
"""
