"""A lowered graph whose code is on disk is not traced again; whatever else decides on the code has another name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compiler.kernels import traits
from fisedit_compiler.kernels.gather_taps import gather_taps
from fisedit_compiler.lowering.codegen import direct, inductor, kept_code, known_graphs
from fisedit_compiler.lowering.codegen.inductor import directly
from fisedit_compiler.lowering.regions import Region
from tests.support.modes import default_dtype, deterministic, one_thread_more, sums_in_half_precision
from tests.support.pass_tools import gather_step

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / known_graphs._FOLDER


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that were traced."""
    found: list[fx.GraphModule] = []
    own = direct._compile_traced

    def noted(graph: fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return own(graph, inputs)

    monkeypatch.setattr(direct, "_compile_traced", noted)
    return found


def operands(rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 9, 16, dtype=dtype), torch.randint(0, 9, (rows, 4))


def check(step: Callable[..., Any], given: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        (result,) = step(*given)
    assert torch.equal(result, gather_taps(given[0] * 2, given[1]) + 1)


def test_a_process_after_the_first_traces_nothing(traced: list[fx.GraphModule]) -> None:
    for _ in range(2):
        step = directly(gather_step())
        for rows in (5, 7, 1, 12):  # the second is another size, and 1 a number of its own
            check(step, operands(rows))
    assert len(traced) == 3


def test_code_that_was_found_serves_the_lengths_that_it_served(traced: list[fx.GraphModule]) -> None:
    def lengths() -> tuple[list[int], list[Any]]:
        step = directly(gather_step())
        check(step, operands(5))
        check(step, operands(7))
        made = step._made[-1]  # type: ignore[attr-defined]
        return [len(made._symbols), len(made.layouts)], [str(condition) for condition in made._conditions]

    assert lengths() == lengths() and len(traced) == 2


def _product(factor: float) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.mul.Tensor, (x, factor)),))
    return graph


def module(graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule({}, graph)


def calling(target: Any, *constants: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(target, (x, *constants)),))
    return module(graph)


def reading_a_weight() -> fx.GraphModule:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    graph.output((graph.call_function(aten.linear.default, (x, weight)),))
    return fx.GraphModule(torch.nn.Linear(3, 3), graph)


def in_region(factor: float) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    inside = Region("block", _product(factor)).as_target()
    call = graph.call_function(inside, (x,))
    graph.output((graph.call_function(__import__("operator").getitem, (call, 0)),))
    return module(graph)


def name(graph: fx.GraphModule, *values: Tensor) -> str | None:
    values = values or (torch.randn(4, 3),)
    layouts = [direct._Layout.of(value, value.shape) for value in values]
    found = known_graphs.KnownGraph(graph, layouts, inductor._decompositions())
    return found.name


OTHERS: list[tuple[fx.GraphModule, Tensor]] = [
    (module(_product(2.0)), torch.randn(4, 3)),
    (module(_product(2.5)), torch.randn(4, 3)),
    (calling(aten.add.Tensor, 2.0), torch.randn(4, 3)),
    (in_region(2.0), torch.randn(4, 3)),
    (in_region(2.5), torch.randn(4, 3)),
    (module(_product(2.0)), torch.randn(4, 4)),
    (module(_product(2.0)), torch.randn(3, 4).t()),
    (module(_product(2.0)), torch.randn(13)[1:].view(4, 3)),
    (module(_product(2.0)), torch.randn(4, 3, dtype=torch.float64)),
]


def test_graphs_and_arguments_that_differ_have_names_that_differ() -> None:
    names = [name(graph, value) for graph, value in OTHERS]
    assert None not in names and len(set(names)) == len(names)
    assert names == [name(graph, value) for graph, value in OTHERS]


_BACKENDS = [torch.nn.attention.SDPBackend(number) for number in torch._C._get_sdp_priority_order()]


@pytest.mark.parametrize(
    "state",
    [
        lambda: default_dtype(torch.float64),
        deterministic,
        one_thread_more,
        sums_in_half_precision,
        lambda: torch.device("meta"),
        lambda: torch.nn.attention.sdpa_kernel(_BACKENDS[::-1], set_priority=True),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        lambda: torch._inductor.config.patch(max_fusion_size=3),
        lambda: torch.compiler.config.patch(cache_key_tag="another version"),
    ],
)
def test_what_else_decides_on_code_is_in_the_name(state: Callable[[], Any]) -> None:
    graph, x = module(_product(2.0)), torch.randn(4, 3)
    plain = name(graph, x)
    with state():
        other = name(graph, x)
    assert other is not None and other != plain == name(graph, x)


def test_code_of_another_version_of_the_package_is_not_found(
    traced: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    check(directly(gather_step()), operands())
    monkeypatch.setattr(kept_code, "digest", lambda: "another version")
    check(directly(gather_step()), operands())
    assert len(traced) == 2


def _elsewhere(x: Tensor) -> Tensor:
    return x * 2


def test_what_has_no_known_source_has_no_name() -> None:
    assert name(calling(_elsewhere)) is None
    assert name(calling(torch.nn.functional.silu)) is None
    assert name(reading_a_weight()) is None


def test_what_another_package_has_compiled_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def named() -> str | None:
        with kept_code.by_digest():
            return name(module(_product(2.0)))

    plain = named()
    monkeypatch.setattr(kept_code, "inlined", lambda: {**traits.inlined(), aten.silu.default: _elsewhere})
    assert plain is not None and named() not in (None, plain)


def _closure(factor: float) -> Callable[[Tensor], Tensor]:
    def times(x: Tensor) -> Tensor:
        return x * factor

    return times


def _of_this_package(function: Callable[..., Any]) -> Any:
    """The function, as one of the package's rooms that are compiled."""
    return type(function)(
        function.__code__,
        {"__name__": "fisedit_compiler.lowering.dense"},
        function.__name__,
        None,
        function.__closure__,
    )


def test_functions_that_are_bound_to_something_have_no_name() -> None:
    assert name(calling(_of_this_package(_elsewhere))) is not None
    assert name(calling(_of_this_package(_closure(2.0)))) is None


def _thrice(x: Tensor) -> Tensor:
    return x * 3


def test_operations_that_are_taken_apart_in_another_way_are_traced(
    traced: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, graph = torch.randn(4, 3), calling(aten.silu.default)
    directly(graph)(x)
    table = {**inductor._decompositions(), aten.silu.default: _thrice}
    monkeypatch.setattr(inductor, "_decompositions", lambda: table)
    assert torch.allclose(directly(graph)(x)[0], x * 3) and len(traced) == 2


def _small_twice(x: Tensor) -> Tensor:
    return x * 2.0 if x.shape[0] < 64 else x * 3.0


def test_code_is_found_for_lengths_that_lead_there_only(traced: list[fx.GraphModule]) -> None:
    """Inductor knows of no condition on the code that both graphs share."""
    branching = calling(_of_this_package(_small_twice))

    def run(graph: fx.GraphModule, *lengths: int) -> list[bool]:
        step = directly(graph)
        given = [torch.randn(length, 3) for length in lengths]
        return [torch.allclose(step(x)[0], _small_twice(x)) for x in given]

    assert all(run(module(_product(2.0)), 5, 7) + run(branching, 5, 7))
    before = len(traced)
    assert all(run(branching, 5, 7, 100)) and len(traced) == before + 1
    assert all(run(branching, 100, 101, 5, 6)) and len(traced) == before + 2, "100 comes as a number first"
    assert all(run(branching, 5, 7, 100, 101, 6)) and len(traced) == before + 2


def test_graphs_without_a_name_are_compiled(traced: list[fx.GraphModule]) -> None:
    x = torch.randn(4, 3)
    for _ in range(2):
        (result,) = directly(calling(_elsewhere))(x)
        assert torch.equal(result, x * 2)
    assert len(traced) == 2


def _emptied(file: Path) -> None:
    file.write_text("")


def _leading_nowhere(file: Path) -> None:
    file.write_text("f" + "0" * 51)


def _no_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")


def _a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [_emptied, _leading_nowhere, _no_text, _a_folder, Path.unlink])
def test_files_that_lead_nowhere_are_as_good_as_none(
    harm: Callable[[Path], Any], traced: list[fx.GraphModule], folder: Path
) -> None:
    check(directly(gather_step()), operands())
    (file,) = folder.iterdir()
    harm(file)
    check(directly(gather_step()), operands())
    assert len(traced) == 2


def test_code_whose_entry_is_gone_is_made_again(traced: list[fx.GraphModule], folder: Path) -> None:
    import shutil

    check(directly(gather_step()), operands())
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
    check(directly(gather_step()), operands())
    assert len(traced) == 2


def test_without_caches_nothing_is_found(traced: list[fx.GraphModule], folder: Path) -> None:
    check(directly(gather_step()), operands())
    with torch._inductor.config.patch(force_disable_caches=True):
        check(directly(gather_step()), operands())
    assert len(traced) == 2
