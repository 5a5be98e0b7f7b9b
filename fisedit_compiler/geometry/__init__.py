"""A mask at every level: site plans, index tables of convolutions, patches, block sizes, break-even.

All of it is made of masks and sizes alone: no value of a model and no recording is read here. May import ``graph`` and
the rooms below.
"""
