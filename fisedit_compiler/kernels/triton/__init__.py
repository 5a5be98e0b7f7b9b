"""Triton kernels of the ``fisedit::`` ops. Imported on the first call on a GPU, never at import time.

One kernel a file; each must match the op's plain-PyTorch reference within ``kernels/tolerances.py``. Kernels are
launched by ``launching.py`` and compiled before that by ``ahead.py``. No op is defined here. May import what the room
``kernels`` may.
"""
