"""What the channels of a PIL image mean, and which way up it is."""

from __future__ import annotations

from PIL import Image, ImageOps

from fisedit_compiler.images.purpose import Purpose

_GREY = frozenset({"1", "L"})
_COLOURED = frozenset({"RGB", "RGBX", "CMYK", "YCbCr", "HSV", "P"})
_TRANSPARENT = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_DAMAGED = "open it in a viewer and save it again as PNG"


def upright(image: Image.Image, purpose: Purpose) -> Image.Image:
    """A decoded copy of the image as a viewer shows it: turned by its EXIF orientation, at the frame it stands at.

    Raises:
        FiseditError: it has no pixels, too many, or cannot be decoded.
    """
    with purpose.guard(_DAMAGED):
        if 0 in image.size:
            raise purpose.error(f"the {purpose.noun} is empty: {image.width} x {image.height} pixels")
        # Before anything is decoded: the size is known from the header.
        purpose.check_size((image.height, image.width))
        image.load()
        turned = ImageOps.exif_transpose(image)
        purpose.check_size((turned.height, turned.width))  # some formats know their size only now
        return turned


def opaque(image: Image.Image, purpose: Purpose) -> Image.Image | None:
    """The image in mode ``L`` (grey) or ``RGB``, its palette resolved; ``None`` if it has transparent pixels.

    An alpha channel that is opaque throughout says nothing and is dropped, since many programs save one with any
    picture.

    Raises:
        FiseditError: the range of the mode's values is not known (16 and 32 bits, floats, LAB), or it is damaged.
    """
    with purpose.guard(_DAMAGED):
        if image.mode not in _GREY | _COLOURED | _TRANSPARENT:
            raise purpose.error(
                f"a {purpose.noun} of mode {image.mode!r} is not supported, since the range of its values is unknown; "
                "bring it to 8 bits a channel first: scale its values to 0..255 and save it as a grey or RGB PNG, or "
                f"pass an array {purpose.arrays}"
            )
        if image.mode in _TRANSPARENT or "transparency" in image.info:
            straight = image.convert("LA") if image.mode == "La" else image
            image = straight.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                return None
        return image.convert("L" if image.mode in _GREY else "RGB")
