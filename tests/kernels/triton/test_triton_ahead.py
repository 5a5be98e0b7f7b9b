"""Kernels that are compiled ahead: the code is that of the later launch, and nobody is told of what fails."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from fisedit_compiler.kernels.addresses import runs_of
from tests.kernels.triton.stand_in import Compilations, compile_without_gpu, forget, forgotten

pytest.importorskip("triton")

Call = Callable[[], Any]


def attention(heads: int = 2, size: int = 64, rows: int = 48, sites: int = 1024, entry: int = 1) -> Call:
    """A call with keys and values found by address, in a table that begins anywhere."""
    from fisedit_compiler.kernels.triton.attention_sites import attention_sites

    query, key, value = torch.empty(3, 2, rows, heads, size, dtype=torch.float16).transpose(2, 3).unbind()
    canvas = torch.empty(2, sites, heads, size, dtype=torch.float16).transpose(1, 2)
    active, inverse = torch.empty(rows, dtype=torch.int64), torch.empty(sites, dtype=torch.int32)
    addresses = torch.empty(9, dtype=torch.int64)[entry:]
    return lambda: attention_sites(
        query, key, value, canvas, canvas, active, inverse, addresses=addresses, entries=(0, 3), merged=False
    )


def merged_attention() -> Call:
    from fisedit_compiler.kernels.triton.attention_sites import attention_sites

    rows, canvas = torch.empty(1, 2, 16, 8), torch.empty(1, 2, 64, 8)
    active, inverse = torch.empty(16, dtype=torch.int64), torch.empty(64, dtype=torch.int32)
    return lambda: attention_sites(rows, rows, rows, canvas, canvas, active, inverse, merged=True)


def cross_attention() -> Call:
    from fisedit_compiler.kernels.triton.cross_attention import cross_attention as kernel

    query = torch.empty(2, 80, 3, 40, dtype=torch.bfloat16).transpose(1, 2)
    text = torch.empty(2, 3, 77, 40, dtype=torch.bfloat16)
    return lambda: kernel(query, text, text)


def statistics(rows: int = 40, channels: int = 320, tile: Any = None) -> Call:
    from fisedit_compiler.kernels.triton.update_statistics import update_statistics

    x, means = torch.empty(2, rows, channels, dtype=torch.float16), torch.empty(2, 32, 2)
    sums, active = torch.empty(2, 144, 32, 2), torch.empty(rows, dtype=torch.int64)
    addresses = torch.empty(5, dtype=torch.int64)
    return lambda: update_statistics(x, means, sums, active, sums=True, addresses=addresses, entry=2, tile=tile)


def split_statistics() -> Call:
    from fisedit_compiler.kernels.triton.update_statistics import Tile

    return statistics(tile=Tile(rows=16, groups=2, splits=2, warps=4))


def gather_taps(channels: int = 24, offset: int = 0) -> Call:
    """Values that begin ``offset`` elements behind the beginning of their memory."""
    from fisedit_compiler.kernels.triton.gather_taps import gather_taps as kernel

    values = torch.empty(2 * 9 * channels + offset, dtype=torch.float16)[offset:].view(2, 9, channels)
    taps = torch.empty(5, 9, dtype=torch.int64)
    return lambda: kernel(values, taps)


def convolve() -> Call:
    from fisedit_compiler.kernels.triton.convolve import convolve as kernel

    values, weight = torch.empty(2, 33, 64, dtype=torch.float16), torch.empty(4, 9 * 64, dtype=torch.float16)
    taps, places = torch.empty(20, 9, dtype=torch.int64), torch.empty(20, dtype=torch.int64)
    return lambda: kernel(values, taps, places, weight, weight[:, 0].contiguous(), (3, 3))


CALLS: dict[str, Callable[[], Call]] = {
    "attention": attention,
    "merged attention": merged_attention,
    "cross attention": cross_attention,
    "statistics": statistics,
    "split statistics": split_statistics,
    "gather": gather_taps,
    "gather from within": lambda: gather_taps(offset=3),
    "convolution": convolve,
}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Compilations]:
    found = compile_without_gpu(monkeypatch, tmp_path, processors=1)
    with forgotten():
        yield found


def noted(call: Callable[[], Call]) -> list[Any]:
    """The launches of a call on fake tensors."""
    from fisedit_compiler.kernels.triton.launching import noting

    launches: list[Any] = []
    with FakeTensorMode(), noting(launches.append):
        call()()
    return launches


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_launch_finds_what_was_compiled_for_fake_tensors(
    call: Callable[[], Call], compilations: Compilations
) -> None:
    from fisedit_compiler.kernels.triton.ahead import CompiledAhead

    with CompiledAhead() as ahead:
        for launch in noted(call):
            ahead.add(launch)
    made = len(compilations.asked)
    assert made and not any(on_disk for _, on_disk in compilations.asked)
    call()()
    assert len(compilations.asked) == made, "a launch compiled another form"
    forget()
    call()()
    assert sorted(compilations.asked[made:]) == sorted((name, True) for name, _ in compilations.asked[:made])


def test_copies_that_follow_on_a_step_are_known(compilations: Compilations) -> None:
    from fisedit_compiler.kernels.triton.ahead import CompiledAhead
    from fisedit_compiler.kernels.triton.copy_out import CopyOut, rehearse
    from fisedit_compiler.kernels.triton.launching import noting

    with CompiledAhead() as ahead, noting(ahead.add):
        rehearse()
    assert [name for name, _ in compilations.asked] == ["_copy_out_kernel"] * 2
    for channels in (16, 4):  # rows of 32 and of 8 bytes
        view = torch.empty(2, 9, channels, dtype=torch.float16)[:, :5]
        runs = runs_of(view)
        assert runs is not None
        CopyOut([view], [runs], [(0, 0)]).run([torch.empty(2, 5, channels, dtype=torch.float16)])
    assert len(compilations.asked) == 2


def test_launches_of_one_form_are_compiled_once(compilations: Compilations) -> None:
    from fisedit_compiler.kernels.triton.ahead import CompiledAhead

    # Numbers of rows and sites, and where the table of addresses begins, do not matter; channels do.
    calls = [statistics, lambda: statistics(rows=64), gather_taps, gather_taps, lambda: gather_taps(channels=32)]
    calls += [attention, lambda: attention(rows=64, sites=2048, entry=2)]
    launches = [launch for call in calls for launch in noted(call)]
    with CompiledAhead() as ahead:
        for launch in launches:
            ahead.add(launch)
    forms = {launch.form for launch in launches}
    names = [name for name, _ in compilations.asked]
    assert len(names) == len(forms) and names.count("_gather_taps_kernel") == 2
    assert names.count("_update_statistics_kernel") == names.count("_attention_sites_kernel") == 1
    for call in calls:
        call()()
    assert len(compilations.asked) == len(forms)


def test_every_launch_of_the_room_can_be_noted() -> None:
    from fisedit_compiler.kernels import triton as room

    folder = Path(str(room.__file__)).parent
    assert not [path.name for path in folder.glob("*.py") if re.search(r"_kernel\[", path.read_text())]


def test_noted_launches_are_those_of_this_thread(compilations: Compilations) -> None:
    from fisedit_compiler.kernels.triton.launching import noting

    launches: list[Any] = []
    with noting(launches.append):
        other = threading.Thread(target=gather_taps())
        other.start()
        other.join()
    assert not launches and [name for name, _ in compilations.asked] == ["_gather_taps_kernel"]


def test_what_cannot_be_compiled_ahead_is_left_to_its_launch(
    compilations: Compilations, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fisedit_compiler.kernels.triton import ahead as module
    from fisedit_compiler.kernels.triton.launching import Launch

    def refuse(launch: Launch) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(Launch, "warm_up", refuse)
        with module.CompiledAhead() as ahead:
            for launch in noted(gather_taps):
                ahead.add(launch)
    assert not caplog.records and not compilations.asked
    gather_taps()()
    assert len(compilations.asked) == 1


def test_an_error_ends_what_has_not_begun(compilations: Compilations, monkeypatch: pytest.MonkeyPatch) -> None:
    from fisedit_compiler.kernels.triton import ahead as module
    from fisedit_compiler.kernels.triton.launching import Launch

    begun, finish = threading.Event(), threading.Event()
    compiled: list[Launch] = []

    def warm_up(launch: Launch) -> None:
        compiled.append(launch)
        begun.set()
        finish.wait(10)

    monkeypatch.setattr(Launch, "warm_up", warm_up)
    monkeypatch.setattr(module, "threads", lambda: 1)
    with pytest.raises(KeyboardInterrupt), module.CompiledAhead() as ahead:
        for channels in (8, 16, 32):
            for launch in noted(lambda channels=channels: gather_taps(channels)):
                ahead.add(launch)
        assert begun.wait(10)
        threading.Timer(0.1, finish.set).start()
        raise KeyboardInterrupt
    assert len(compiled) == 1
    assert not any(thread.name.startswith("fisedit-triton") for thread in threading.enumerate())


def test_nothing_is_compiled_where_triton_interprets(compilations: Compilations) -> None:
    from fisedit_compiler.kernels.triton.ahead import CompiledAhead
    from fisedit_compiler.kernels.triton.launching import Launch

    kernel = SimpleNamespace(arg_names=[], do_not_specialize=[], do_not_specialize_on_alignment=[])
    with CompiledAhead() as ahead:
        ahead.add(Launch(_Hashable(kernel), (), {}))
        assert ahead._threads is None


class _Hashable:
    def __init__(self, values: SimpleNamespace) -> None:
        self.__dict__.update(vars(values))


def test_a_note_keeps_no_tensor(compilations: Compilations) -> None:
    launches = noted(attention)
    assert launches and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves([vars(x) for x in launches]))
