"""Images as users have them: files, PIL images, arrays and tensors, read by one reader for masks and pictures alike.

Nothing here knows what an image is for. ``reading`` is the door; ``files`` opens what lies on disk, ``arrays`` looks at
what lies in memory, ``modes`` turns an image upright and says what its channels mean. A reader is given a
:class:`Purpose`, which says how the thing is called in errors and of which class those are; no other error gets out.
May import ``progress`` beside it, ``tensors``, ``compiling``, ``pages``, ``files``, ``config`` and the rooms below.
"""

from fisedit_compiler.images.modes import opaque
from fisedit_compiler.images.purpose import MASK, MAX_PIXELS, PICTURE, Purpose
from fisedit_compiler.images.reading import ImageLike, naming, read

__all__ = ["MASK", "MAX_PIXELS", "PICTURE", "ImageLike", "Purpose", "naming", "opaque", "read"]
