"""Thousands of damaged files, read as a mask and as a picture: each is read or refused in words.

``pytest -s tests/images/test_damaged_files.py`` prints how many were read and refused.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import pytest

from fisedit_compiler.errors import FiseditError, MaskError, PictureError
from fisedit_compiler.masks import mask_pixels
from fisedit_compiler.pipelines.inversion.pictures import read_picture
from tests.images.seeds import damaged, seeds

_PER_SEED = 36
_READERS = {"mask": (mask_pixels, MaskError), "picture": (read_picture, PictureError)}


def test_no_foreign_exception_from_damaged_files(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    foreign = []
    wholes = seeds()
    for name, whole in wholes.items():
        path = tmp_path / name
        for number, content in enumerate(damaged(whole, _PER_SEED, name)):
            path.write_bytes(content)
            counts["files"] += 1
            for noun, (reader, expected) in _READERS.items():
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
                        reader(path)
                    counts[f"{noun}: read"] += 1
                except expected as error:
                    counts[f"{noun}: refused"] += 1
                    if name not in str(error):
                        foreign.append(f"{name} {number}: does not name its file: {error}")
                except Exception as error:
                    foreign.append(f"{name} {number} as a {noun}: {type(error).__name__}: {error}")
    print(f"\n{len(wholes)} seeds, {dict(counts)}, {len(foreign)} foreign exceptions")
    assert not foreign, "\n".join(foreign[:20])
    assert counts["files"] >= 1950


@pytest.mark.parametrize("noun", _READERS)
def test_warnings_that_are_errors_do_not_get_out_either(tmp_path: Path, noun: str) -> None:
    reader, expected = _READERS[noun]
    path = tmp_path / "spoilt.tiff"
    for content in damaged(seeds()["RGB.tiff"], 120, "warnings"):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                reader(path)
            except FiseditError as error:
                assert isinstance(error, expected)
