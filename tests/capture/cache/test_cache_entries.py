"""What may stand in a cache entry: nothing that runs, nothing that is not understood, whatever its digest says."""

from __future__ import annotations

import contextlib
import copy
import json
import string
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from fisedit_compiler import SparseModule, SparsifyConfig, sparsify
from fisedit_compiler.capture import cache
from fisedit_compiler.capture.cache import graphs, store
from fisedit_compiler.capture.cache.sizes import read_size, write_size
from fisedit_compiler.capture.cache.targets import FUNCTIONS, find_target, target_text
from fisedit_compiler.capture.captured import CapturedGraph
from fisedit_compiler.graph.signatures import CallSignature
from fisedit_compiler.graph.sizes import BATCH, HEIGHT, TEXT, WIDTH
from tests.support.compiled_zoo import base_inputs, zoo_model

SYMBOLS = (BATCH, HEIGHT, WIDTH, TEXT)


def compiled() -> SparseModule:
    model = zoo_model("pooled")
    example = base_inputs("pooled", 2, (8, 24))
    return sparsify(copy.deepcopy(model.module), SparsifyConfig(multiple=model.multiple), example_inputs=example)


class Entry:
    """An entry on disk, its parts, and the call it belongs to."""

    def __init__(self, folder: Path) -> None:
        self.signature: CallSignature = compiled().programs[0].signature
        (self.path,) = folder.iterdir()
        self.content = store.read(self.path) or b""
        self.document: Any = cache._document(self.content)
        self.tensors = read_tensors(self.content)

    def write(self, document: Any) -> None:
        """Another document under the same name, with a right format and digest."""
        fields = document | {"format": cache.FORMAT} if isinstance(document, dict) else document
        store.write(self.path, write_tensors(self.tensors, metadata={"graph": json.dumps(fields)}))

    def load(self, document: Any) -> CapturedGraph | None:
        self.write(document)
        return cache.load(self.path, self.signature)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FISEDIT_CACHE_DIR", str(folder))
        yield Entry(folder)


# -- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4*h*w + 77", 4 * HEIGHT * WIDTH + 77),
        ("h**2 - 2*h + 1", HEIGHT**2 - 2 * HEIGHT + 1),
        ("-b/2 + t", TEXT - BATCH / 2),
        ("((h//2))", FloorDiv(HEIGHT, 2)),
        ("Mod(h*w, 3)", Mod(HEIGHT * WIDTH, sympy.Integer(3))),
        ("floor(h/2)", sympy.floor(HEIGHT / 2)),
        ("Max(1, h)**-2", sympy.Max(1, HEIGHT) ** -2),
        ("-2**2", sympy.Integer(-4)),
    ],
)
def test_sizes_are_read_as_they_are_written(text: str, size: Any) -> None:
    assert read_size(text) == size
    assert read_size(write_size(size)) == size


def expressions() -> st.SearchStrategy[Any]:
    leaves = st.one_of(st.integers(-9, 999).map(sympy.Integer), st.sampled_from(SYMBOLS))

    def larger(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        two = st.tuples(parts, parts)
        return st.one_of(
            two.map(lambda p: p[0] + p[1]),
            two.map(lambda p: p[0] * p[1]),
            parts.map(lambda p: FloorDiv(p, sympy.Integer(2))),
            parts.map(lambda p: PythonMod(p, sympy.Integer(3))),
        )

    return st.recursive(leaves, larger, max_leaves=6)


@given(expressions())
def test_every_size_is_kept_exactly_or_not_at_all(size: Any) -> None:
    try:
        text = write_size(size)
    except ValueError:
        return
    assert read_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open(b)",
        "b.free_symbols",
        "lambda: 0",
        "9**9**9**9",
        "(((2*h)**16)**16)**16",
        "h**(h)",
        "9999999999999999999",
        "1/0",
        "h//0",
        "Mod(h, 0)",
        "floor(h, w)",
        "(" * 500,
        "-" * 2000 + "1",
        "h h",
        "",
        "x",
        3,
        None,
        "٣",
    ],
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError):
        read_size(text)


@given(st.one_of(st.text(max_size=30), st.text("bhwt0129+-*/(), ModflrFDivx", max_size=30)))
@settings(max_examples=200)
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(read_size(text), sympy.Expr)


# -- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "fn:torch.load",
        "fn:torch.hub.load",
        "fn:operator.attrgetter",
        "fn:operator.methodcaller",
        "fn:operator.setitem",
        "fn:builtins.eval",
        "fn:os.system",
        "op:aten.save.default",
        "op:aten.from_file.default",
        "op:aten.from_file.out",
        "op:aten.warn.default",
        "op:aten._print.default",
        "op:aten.add_.Tensor",
        "op:aten.add.out",
        "op:aten.add.__call__",
        "op:aten.__class__.default",
        "op:aten.add",
        "op:aten.no_such_thing.default",
        "op:prim.RaiseException.default",
        "op:__class__.mro.default",
        "op:profiler._record_function_enter.default",
        "op:",
        "",
    ],
)
def test_only_functional_operations_of_known_namespaces_are_called(text: str) -> None:
    with pytest.raises(ValueError):
        find_target(text)


def test_operations_and_functions_are_found_by_their_names() -> None:
    operations = [torch.ops.aten.conv2d.default, torch.ops.aten.split.Tensor, torch.ops.aten.sym_size.int]
    for target in (*operations, *FUNCTIONS.values()):
        assert find_target(target_text(target)) is target
    for target in (torch.load, torch.ops.aten.add_.Tensor, len, compiled):
        with pytest.raises(NotImplementedError):
            target_text(target)


def test_a_registered_rule_makes_a_namespace_known() -> None:
    from fisedit_compiler.extend import opaque
    from fisedit_compiler.graph.layout_rules import LAYOUT_RULES

    @torch.library.custom_op("cachetest::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    operation = torch.ops.cachetest.twice.default
    with pytest.raises(NotImplementedError, match=r"fisedit_compiler\.extend"):
        target_text(operation)
    LAYOUT_RULES[operation] = lambda node, inferred: opaque(inferred.rank, "a test")
    try:
        assert find_target(target_text(operation)) is operation
    finally:
        del LAYOUT_RULES[operation]


# -- documents -----------------------------------------------------------------------------------


def test_the_unchanged_document_is_read(entry: Entry) -> None:
    assert entry.load(entry.document) is not None


def with_node(document: Any, op: str, /, **changes: Any) -> Any:
    changed = copy.deepcopy(document)
    node = next(node for node in changed["nodes"] if node["op"] == op)
    node.update(changes)
    return changed


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("placeholder", {"target": "sample, x=print('code')"}),
        ("placeholder", {"args": [1]}),
        ("placeholder", {"name": "a\nb"}),
        ("placeholder", {"name": "lambda"}),
        ("get_attr", {"target": '"]; print(1); x["'}),
        ("get_attr", {"target": "__class__.__init__"}),
        ("get_attr", {"target": "conv.__dict__"}),
        ("call_function", {"kwargs": {"a=print(1), b": 1}}),
        ("call_function", {"args": []}),
        ("call_function", {"args": [{"node": "later"}]}),
        ("call_function", {"op": "call_method"}),
        ("call_function", {"op": "call_module"}),
        ("call_function", {"spec": [["b"], "torch.load"]}),
        ("call_function", {"spec": [["__import__('os')"], "torch.float32"]}),
        ("call_function", {"extra": 1}),
        ("output", {"args": [{"torch": "nn"}]}),
        ("output", {"args": []}),
    ],
)
def test_a_field_that_is_not_ours_is_refused(entry: Entry, op: str, changes: dict[str, Any]) -> None:
    assert entry.load(with_node(entry.document, op, **changes)) is None


@pytest.mark.parametrize(
    "outputs",
    [{"dict": [["__class__", None], ["__class__", None]]}, {"OrderedDict": []}, {"tuple": [None] * 3}, "null", [[]], 5],
)
def test_outputs_are_in_plain_containers_and_as_many(entry: Entry, outputs: Any) -> None:
    loaded = entry.load(entry.document | {"outputs": outputs})
    assert loaded is None or loaded.treespec.num_leaves == 1


def test_lines_of_source_stay_one_comment(entry: Entry) -> None:
    loaded = entry.load(with_node(entry.document, "call_function", source="a.py:1: x\nprint(1)\r\x0bprint(2)"))
    assert loaded is not None
    assert all(len((node.meta.get("source") or "").splitlines()) < 2 for node in loaded.graph.nodes)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(string.printable, max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["node", "tuple", "torch", "device", "dict", "x"]), inner, max_size=2),
    ),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_document_whatever_raises_anything(entry: Entry, data: st.DataObject) -> None:
    """One part of a right document is replaced, at any depth, by any JSON value, text of another part included."""
    root = {"document": copy.deepcopy(entry.document)}
    parent: Any = root
    key: Any = "document"
    while isinstance(parent[key], (dict, list)) and parent[key] and data.draw(st.integers(0, 4)):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    others = st.sampled_from(["op:aten.relu.default", "fn:operator.mul", "b*h", "sample", "get_attr", "torch.int8"])
    parent[key] = data.draw(st.one_of(JSON, others))
    loaded = entry.load(root["document"])
    assert loaded is None or isinstance(loaded, CapturedGraph)


@given(st.binary(max_size=200))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_whatever_raises_anything(entry: Entry, content: bytes) -> None:
    store.write(entry.path, content)
    assert cache.load(entry.path, entry.signature) is None


def test_a_document_of_another_format_is_refused(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    entry.write(entry.document)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert cache.load(entry.path, entry.signature) is None


def test_an_entry_that_cannot_be_compiled_is_captured_again(entry: Entry, caplog: pytest.LogCaptureFixture) -> None:
    """A graph may be well formed and still make no sense: no error of it reaches the user."""
    changed = copy.deepcopy(entry.document)
    for node in changed["nodes"]:
        if node["op"] == "placeholder":
            del node["spec"]
    entry.write(changed)
    assert cache.load(entry.path, entry.signature) is not None
    module = compiled()
    assert not module.programs[0].from_cache and "captured again" in caplog.text
    assert compiled().programs[0].from_cache, "the entry was written again"


def test_a_graph_that_plain_data_cannot_hold_is_not_kept(entry: Entry) -> None:
    captured = entry.load(entry.document)
    assert captured is not None
    node = next(node for node in captured.graph.nodes if node.op == "call_function")
    node.kwargs = {"strange": slice(0, 1)}
    with pytest.raises(NotImplementedError, match="slice"):
        graphs.encode(captured)
    entry.path.unlink()
    cache.save(entry.path, captured)
    assert not entry.path.exists()
