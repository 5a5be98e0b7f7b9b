"""One edit or several, from checked arguments to results.

Which sites a found mask has is ``detectors/``'s, how pictures look is ``drawing/``'s. May import what the room
``pipelines`` may.
"""
