"""Contents of tensors: compared bit for bit, numbered, and checked late on a device.

Nothing here knows what a tensor stands for. May import ``errors`` only.
"""
