"""What two commits compile and compute for the zoo, side by side: ``make replay BASE=<commit>``.

A refactoring is to change nothing but names and order. ``write.py`` writes what one commit makes of every model into a
folder, ``compare.py`` says how two folders differ, ``__main__.py`` does both for a commit and the working tree. Every
line that knows where something is in the package is in ``access.py``.
"""
