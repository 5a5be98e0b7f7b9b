"""Captions of the embedded model's own grammar, in pairs that differ by one edit.

``emoji-scenes`` was trained on captions such as "a small cat on the left and a rocket on the right, blue background";
its model card lists the words. From the position words follows where the changed object is: that is the pair's region.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from fisedit_compiler.errors import ConfigError
from fisedit_compiler.evaluation.pairs.pairs import Box, EditPair
from fisedit_compiler.models import embedded_object_names

COLOURS = (
    "black", "blue", "brown", "gray", "green", "orange", "pink", "purple", "red", "teal", "white", "yellow",
)  # fmt: skip
SCENES = (
    "night sky", "sunset", "grass field", "desert", "ocean", "snow field", "brick wall", "wooden floor", "mountains",
    "city at night",
)  # fmt: skip
ATTRIBUTES = ("golden", "silver", "blue")
SIZES = ("small", "tiny", "large")
WEATHER = ("in the rain", "with snow falling", "in the fog")
OVERLAYS = ("under fireworks", "under a rainbow")

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

ONE: tuple[tuple[str, Box], ...] = (
    ("on the left", (0.0, 0.0, 1.0, 0.75)),
    ("on the right", (0.0, 0.25, 1.0, 1.0)),
    ("in the center", (0.05, 0.05, 0.95, 0.95)),
    ("in the top left", (0.0, 0.0, 0.7, 0.7)),
    ("in the top right", (0.0, 0.3, 0.7, 1.0)),
    ("in the bottom left", (0.3, 0.0, 1.0, 0.7)),
    ("in the bottom right", (0.3, 0.3, 1.0, 1.0)),
)
"""Places of an only object. A large one reaches beyond the middle, so the boxes do."""

TWO: tuple[tuple[tuple[str, Box], tuple[str, Box]], ...] = (
    (("on the left", (0.0, 0.0, 1.0, 0.5)), ("on the right", (0.0, 0.5, 1.0, 1.0))),
    (("in the top left", (0.0, 0.0, 0.55, 0.55)), ("in the bottom right", (0.45, 0.45, 1.0, 1.0))),
    (("in the top right", (0.0, 0.45, 0.55, 1.0)), ("in the bottom left", (0.45, 0.0, 1.0, 0.55))),
    (("at the top", (0.0, 0.0, 0.5, 1.0)), ("at the bottom", (0.5, 0.0, 1.0, 1.0))),
)
"""Places of two objects: one has the half or the corner that the other has not."""

_CYCLE = (
    "object", "object", "background", "object", "object", "attribute", "object", "object", "object", "weather",
    "object", "object", "size", "object", "object", "background", "object", "object", "add", "object",
)  # fmt: skip
"""Kinds of twenty pairs in a row: 70 % object swaps, and every kind among the first that ``--limit`` leaves."""

MOST_PAIRS = 100_000
"""In one file; the grammar has more, but drawing the last of them would take forever."""

_PLAIN = re.compile(rf"\b({'|'.join(COLOURS)}) background$")


@dataclass(frozen=True)
class Thing:
    """An object of a caption: its name, an adjective, its position words, and its place."""

    name: str
    position: str
    region: Box
    adjective: str = ""

    def __str__(self) -> str:
        words = f"{self.adjective} {self.name}".strip()
        return f"{_article(words)} {words} {self.position}"


@dataclass(frozen=True)
class Scene:
    """A caption: one or two objects, a backdrop, and what falls or glows over all of it."""

    things: tuple[Thing, ...]
    backdrop: str
    overlay: str = ""

    def __str__(self) -> str:
        parts = [" and ".join(str(thing) for thing in self.things), self.backdrop, self.overlay]
        return ", ".join(part for part in parts if part)

    def having(self, index: int, thing: Thing) -> Scene:
        """The scene with another thing at ``index``."""
        return replace(self, things=(*self.things[:index], thing, *self.things[index + 1 :]))


def make_pairs(count: int, seed: int = 0) -> list[EditPair]:
    """``count`` different pairs, about 70 % of them object swaps; the same for the same ``seed``.

    Every pair has a seed for the noise, a kind and a region.

    Raises:
        ConfigError: ``count`` is less than 1, or more than :data:`MOST_PAIRS`.
    """
    if not 1 <= count <= MOST_PAIRS:
        raise ConfigError(f"--make-pairs {count}: the number of pairs must be from 1 to {MOST_PAIRS}")
    rng = random.Random(seed)
    pairs: list[EditPair] = []
    seen: set[tuple[str, str]] = set()
    while len(pairs) < count:
        pair = _make_pair(_kind(len(pairs)), rng)
        if (pair.input, pair.output) not in seen:
            seen.add((pair.input, pair.output))
            pairs.append(pair)
    return pairs


def has_plain_background(caption: str) -> bool:
    """Whether the caption ends with one of the plain colours, so that objects stand out from a smooth backdrop."""
    return _PLAIN.search(caption) is not None


def _kind(number: int) -> str:
    kind = _CYCLE[number % len(_CYCLE)]
    # Rain over all of the picture and fireworks over parts of it take turns.
    return "overlay" if kind == "weather" and number // len(_CYCLE) % 2 else kind


def _make_pair(kind: str, rng: random.Random) -> EditPair:
    before = _scene(rng, fewest=2 if kind == "add" else 1)
    index = rng.randrange(len(before.things))
    thing = before.things[index]
    region = thing.region
    if kind == "object":
        other = rng.choice([name for name in embedded_object_names() if name not in {t.name for t in before.things}])
        after = before.having(index, replace(thing, name=other))
        edit = f"replace the {thing.name} by {_article(other)} {other}"
    elif kind in ("attribute", "size"):
        adjective = rng.choice(ATTRIBUTES if kind == "attribute" else SIZES)
        after = before.having(index, replace(thing, adjective=adjective))
        edit = f"make the {thing.name} {adjective}"
    elif kind == "add":
        after, before = before, replace(before, things=before.things[:index] + before.things[index + 1 :])
        edit = f"add {thing}"
    elif kind == "background":
        after = replace(before, backdrop=rng.choice([name for name in _backdrops() if name != before.backdrop]))
        edit, region = f"change the background to {after.backdrop.removesuffix(' background')}", WHOLE
    else:
        after = replace(before, overlay=rng.choice(WEATHER if kind == "weather" else OVERLAYS))
        edit, region = f"put it {after.overlay}", WHOLE
    return EditPair(str(before), edit, str(after), seed=rng.randrange(2**31), region=region, kind=kind)


def _scene(rng: random.Random, fewest: int = 1) -> Scene:
    names = rng.sample(embedded_object_names(), 2)
    if fewest == 2 or rng.random() < 0.6:
        places = list(rng.choice(TWO))
        rng.shuffle(places)
    else:
        places = [rng.choice(ONE)]
    things = tuple(Thing(name, position, box) for name, (position, box) in zip(names, places, strict=False))
    # Half of the backdrops plain: there the objects' pixels can be told from the picture alone.
    plain = rng.random() < 0.5
    return Scene(things, rng.choice(_backdrops()[: len(COLOURS)] if plain else SCENES))


def _backdrops() -> list[str]:
    return [*(f"{colour} background" for colour in COLOURS), *SCENES]


def _article(words: str) -> str:
    return "an" if words[0] in "aeio" or words.startswith("umbrella") else "a"
