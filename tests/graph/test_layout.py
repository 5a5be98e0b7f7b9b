"""The layout lattice: which axes are sites, by shape alone and through the views that shapes cannot judge."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy
import torch
from torch import fx

from fisedit_compiler.graph import ir
from fisedit_compiler.graph.layout import Layout, opaque
from fisedit_compiler.graph.layout_rules import LayoutRules, spatial_view_problem
from fisedit_compiler.graph.site_order import SITES
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, TEXT, WIDTH, row_symbol
from fisedit_compiler.graph.specs import ValueSpec
from fisedit_compiler.graph.views import view_groups

b, h, w, t = BATCH, HEIGHT, WIDTH, TEXT
MULTIPLE = 8
aten = torch.ops.aten


def layout_of(*shape: sympy.Expr | int, multiple: int = MULTIPLE) -> Layout:
    return LayoutRules(multiple).from_spec(ValueSpec(tuple(map(sympy.sympify, shape)), torch.float32))


def through_view(before: tuple[sympy.Expr | int, ...], after: tuple[sympy.Expr | int, ...]) -> Layout:
    """Layout of a view's result, as :meth:`LayoutRules.annotate` infers it."""
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["spec"] = ValueSpec(tuple(map(sympy.sympify, before)), torch.float32)
    spec = ValueSpec(tuple(map(sympy.sympify, after)), torch.float32)
    view = ir.call(graph, aten.view.default, (source, list(after)), spec=spec)
    graph.output(view)
    LayoutRules(MULTIPLE).annotate(graph)
    return view.meta["layout"]


@pytest.mark.parametrize(
    ("shape", "kind", "level", "axes"),
    [
        ((b, 4, 8 * h, 8 * w), "map", 1, (2, 3)),
        ((b, 320, 4 * h, 4 * w), "map", 2, (2, 3)),
        ((b, 1280, h, w), "map", 8, (2, 3)),
        ((b, 3, 64 * h, 64 * w), "map", Fraction(1, 8), (2, 3)),
        ((b, 4 * h, 4 * w, 320), "map", 2, (1, 2)),
        ((4 * h, 4 * w), "map", 2, (0, 1)),
        ((b, 16 * h * w, 320), "tokens", 2, (1,)),
        ((b, 8, 64 * h * w, 40), "tokens", 1, (2,)),
        ((b, 32, h * w), "tokens", 8, (2,)),
        ((b, 1280), "plain", None, ()),
        ((b, t, 768), "plain", None, ()),
        ((), "plain", None, ()),
    ],
)
def test_by_shape_alone(
    shape: tuple[sympy.Expr, ...], kind: str, level: Fraction | None, axes: tuple[int, ...]
) -> None:
    layout = layout_of(*shape)
    assert (layout.kind, layout.level, layout.axes) == (kind, level, axes)
    assert layout.rank == len(shape)


def test_maps_of_swapped_axes_are_maps() -> None:
    """Width before height: the axes remember which is which."""
    layout = layout_of(b, 4, 8 * w, 8 * h)
    assert layout.kind == "map" and layout.axes == (3, 2)
    assert layout != layout_of(b, 4, 8 * h, 8 * w)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((b, 4 * h * w, 4 * h * w), "attention matrix"),
        ((b, 8, 64 * h * w, 64 * h * w), "attention matrix"),
        ((b, 4 * h, 8 * w), "height is scaled by 4 but width by 8"),
        ((b * h * w, 320), "merges the batch with sites"),
        ((b * 8 * h, 320, 8 * w), "merges the batch with sites"),
        ((b, 320, 8 * h), "relates sites to sites"),
        ((b, 2 * h * w, 320), "no level of the model"),
        ((b, h**2, 320), "not a whole multiple"),
        ((b, 8 * h + 2, 8 * w + 2), "relates sites to sites"),
    ],
    ids=str,
)
def test_what_is_no_lattice_has_a_reason(shape: tuple[sympy.Expr, ...], words: str) -> None:
    layout = layout_of(*shape)
    assert layout.kind == "opaque" and not layout.is_rows
    assert words in layout.reason


def test_text_and_image_tokens_side_by_side() -> None:
    for size in (64 * h * w + t, 77 + 64 * h * w):
        layout = layout_of(b, size, 320)
        assert layout.kind == "concat" and layout.axes == (1,) and not layout.is_rows
        assert "other tokens beside sites" in layout.reason


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ((b, 320, 8 * h, 8 * w), (b, 320, 64 * h * w), "tokens"),
        ((b, 8 * h, 8 * w, 320), (b, 64 * h * w, 320), "tokens"),
        ((b, 64 * h * w, 320), (b, 8 * h, 8 * w, 320), "map"),
        ((b, 64 * h * w, 320), (b, 64 * h * w, 8, 40), "tokens"),
        ((b, 320, 8 * h, 8 * w), (b, 32, 10, 8 * h, 8 * w), "map"),
        ((b, 320, 8 * h, 8 * w), (b, 1, 320, 8 * h, 8 * w), "map"),
    ],
)
def test_views_that_keep_sites_apart(before: tuple[sympy.Expr, ...], after: tuple[sympy.Expr, ...], kind: str) -> None:
    layout = through_view(before, after)
    assert layout.kind == kind and layout.level == 1


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        # Windows of 8x8 sites: h x w windows, 64 sites each, which by shape alone look like level 8.
        ((b, 64 * h * w, 320), (b, h * w, 64, 320), "number of sites"),
        ((b, 320, 8 * h, 8 * w), (b, 320, h, 8, w, 8), "number of sites"),
        # Space to depth, the reshape of a pixel shuffle.
        ((b, 4, 8 * h, 8 * w), (b, 4, 4 * h, 2, 4 * w, 2), "number of sites"),
        # All tokens of the batch in one axis.
        ((b, 64 * h * w, 320), (64 * b * h * w, 320), "merges the batch with sites"),
        # [W, H] flattened is not the token order.
        ((b, 320, 8 * w, 8 * h), (b, 320, 64 * h * w), "flattens columns before rows"),
        ((b, 320, 64 * h * w), (b, 320, 8 * w, 8 * h), "unflattens columns before rows"),
    ],
    ids=["windows of tokens", "windows", "space to depth", "[B*S, C]", "columns first", "columns first back"],
)
def test_views_that_cut_or_merge_sites_are_refused(
    before: tuple[sympy.Expr, ...], after: tuple[sympy.Expr, ...], words: str
) -> None:
    layout = through_view(before, after)
    assert layout.kind == "opaque" and words in layout.reason


def test_a_merge_with_channels_is_refused() -> None:
    """``[B, S, 64] -> [B, 64*S]`` cannot be told from a finer level by its shape; the view tells."""
    layout = through_view((b, h * w, 64), (b, 64 * h * w))
    assert layout.kind == "opaque"


def test_view_groups() -> None:
    assert view_groups((b, sympy.Integer(6), h * w), (b, sympy.Integer(2), sympy.Integer(3), h * w)) == [
        ((0,), (0,)),
        ((1,), (1, 2)),
        ((2,), (3,)),
    ]
    assert view_groups((b, h, w), (b, h * w)) == [((0,), (0,)), ((1, 2), (1,))]
    assert view_groups((b, h, w), (b, w, h)) == [((0,), (0,)), ((1, 2), (1, 2))]
    assert view_groups((b, sympy.Integer(3)), (b, sympy.Integer(4))) is None


def test_a_view_across_two_groups() -> None:
    source, target = layout_of(b, 320, 8 * h, 8 * w), layout_of(b, 8 * h, 8 * w, 320)
    groups = view_groups((b, sympy.Integer(320), 8 * h, 8 * w), (b, 8 * h, 8 * w, sympy.Integer(320)))
    assert groups is not None
    assert "merges sites with channels" in str(spatial_view_problem(groups, source, target))


def test_packed_forms() -> None:
    """Maps pack channels last behind the batch; tokens keep their order of axes."""
    cases = [
        (layout_of(b, 4, 8 * h, 8 * w), (0, SITES, 1), {0: 0, 1: 2, 2: None, 3: None}),
        (layout_of(b, 8 * h, 8 * w, 4), (0, SITES, 3), {0: 0, 3: 2, 1: None}),
        (layout_of(b, 8, 64 * h * w, 40), (0, 1, SITES, 3), {1: 1, 2: None, 3: 3, -1: 3}),
        (layout_of(8 * h, 8 * w), (SITES,), {0: None, 1: None}),
        (layout_of(b, 1, 4, 8 * h, 8 * w), (0, SITES, 1, 2), {1: 2, 2: 3}),
    ]
    for layout, axes, dims in cases:
        assert layout.packed_axes() == axes
        assert layout.site_dim() == axes.index(SITES)
        assert {dim: layout.packed_dim(dim) for dim in dims} == dims
    spec = ValueSpec((b, sympy.Integer(4), 8 * h, 8 * w), torch.float16)
    rows = row_symbol(Fraction(1))
    assert cases[0][0].row_spec(spec) == ValueSpec((b, rows, sympy.Integer(4)), torch.float16)


def test_layouts_say_what_they_are() -> None:
    assert str(layout_of(b, 4, 4 * h, 4 * w)) == "map@2"
    assert str(layout_of(b, 64 * h * w, 4)) == "tokens@1"
    assert str(layout_of(b, 4)) == "plain"
    assert str(opaque(2, "of a reason")) == "opaque (of a reason)"
