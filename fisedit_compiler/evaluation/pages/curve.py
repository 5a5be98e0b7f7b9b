"""The trade-off curve: how much of the edit shows against how much of the base stays, as InstructPix2Pix's figure 8."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = (
    "#1971c2", "#e03131", "#2b8a3e", "#e8590c", "#9c36b5", "#0c8599", "#846358", "#5c940d", "#c2255c", "#364fc7",
    "#868e96", "#f08c00",
)  # fmt: skip
_MARKERS = "osD^vPX*<>hp"


def trade_off(results: Mapping[str, Any], group: str = "all") -> Figure:
    """Mean directional similarity against mean image similarity, with 95 % bootstrap intervals.

    A method with a parameter is a curve, the others are points. To the right the base is kept, upwards the caption is
    followed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = figure.subplots()
    families: dict[str, list[Mapping[str, Any]]] = {}
    for method in results["methods"]:
        if "image_similarity" in method["groups"].get(group, {}):
            families.setdefault(method["family"], []).append(method)
    most = max((method["groups"][group]["pairs"] for members in families.values() for method in members), default=0)
    for index, (family, methods) in enumerate(families.items()):
        style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        title = methods[0]["title"] if methods[0]["parameter"] is None else methods[0]["title"].rsplit(" ", 1)[0]
        pairs = min(method["groups"][group]["pairs"] for method in methods)
        missing = f" ({pairs} of {most} pairs)" if pairs < most else ""
        x, x_error = _axis(methods, group, "image_similarity")
        y, y_error = _axis(methods, group, "directional_similarity")
        line = "-" if len(methods) > 1 else "none"
        axes.errorbar(
            x,
            y,
            xerr=x_error,
            yerr=y_error,
            linestyle=line,
            capsize=2,
            elinewidth=0.8,
            label=f"{family}: {title}{missing}",
            **style,
        )
        for method, position in zip(methods, zip(x, y, strict=True), strict=True):
            if method["parameter"] is not None:
                axes.annotate(
                    f"{method['parameter']:g}", position, xytext=(5, 5), textcoords="offset points", fontsize=8
                )
    axes.set_xlabel("image-image CLIP similarity (the base is kept)")
    axes.set_ylabel("directional CLIP similarity (the caption is followed)")
    axes.grid(alpha=0.3)
    if families:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def as_svg(figure: Figure, *, inline: bool = False) -> str:
    """A figure as an SVG element, for a file or, ``inline``, for an HTML page, where names of XML mean nothing."""
    import matplotlib

    buffer = io.StringIO()
    # Fixed names inside the file: the same results give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fisedit", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text) if inline else text


def _axis(
    methods: Sequence[Mapping[str, Any]], group: str, metric: str
) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Means, and how far the interval goes below and above each."""
    found = [method["groups"][group][metric] for method in methods]
    means = [item["mean"] for item in found]
    below = [max(item["mean"] - item["low"], 0.0) for item in found]
    above = [max(item["high"] - item["mean"], 0.0) for item in found]
    return means, (below, above)
