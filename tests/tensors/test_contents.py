"""Numbers for contents: equal contents, equal numbers, whoever wrote to the tensor and however."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.tensors.contents import ContentNumbers, Later, is_equal
from fisedit_compiler.tensors.deferred import DeferredChecks

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def test_equal_contents_have_one_number() -> None:
    numbers, text = ContentNumbers(), torch.randn(2, 3)
    first = numbers.of("text", text, 2)
    assert numbers.of("text", text.clone(), 2) == first
    assert numbers.of("text", text + 1, 2) != first
    assert numbers.of("image", text, 2) != first, "numbers of different inputs are not compared"


@pytest.mark.parametrize(
    "other", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3), -torch.zeros(2, 3)], ids=str
)
def test_shape_dtype_and_every_bit_count(other: Tensor) -> None:
    numbers = ContentNumbers()
    assert numbers.of("text", torch.zeros(2, 3), 2) != numbers.of("text", other, 2)


DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.bool, torch.int64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_and_any_strides(dtype: torch.dtype) -> None:
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    assert is_equal(value, value.clone()) and is_equal(value.t().contiguous(), value.t())
    assert not is_equal(value, torch.zeros(2, 3).to(dtype))


def test_a_nan_is_itself() -> None:
    value = torch.tensor([1.0, float("nan")])
    assert is_equal(value, value.clone())


def rewrite_in_place(value: Tensor, new: Tensor) -> None:
    value.copy_(new)


def rewrite_by_data(value: Tensor, new: Tensor) -> None:
    value.data.copy_(new)


def rewrite_by_numpy(value: Tensor, new: Tensor) -> None:
    value.numpy()[:] = new.numpy()


def rewrite_by_dlpack(value: Tensor, new: Tensor) -> None:
    torch.from_dlpack(value.detach()).copy_(new)


def rewrite_by_set(value: Tensor, new: Tensor) -> None:
    value.data = new.clone()


WRITES = [rewrite_in_place, rewrite_by_data, rewrite_by_numpy, rewrite_by_dlpack, rewrite_by_set]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_every_write_is_seen(write: Callable[[Tensor, Tensor], None], inference: bool) -> None:
    numbers = ContentNumbers()
    with torch.inference_mode(inference):
        old, new = torch.zeros(2), torch.ones(2)
        text = old.clone()
        first = numbers.of("text", text, 2)
        write(text, new)
        assert numbers.of("text", new.clone(), 2) != first, "a fresh tensor of the new contents"
        assert numbers.of("text", text, 2) == numbers.of("text", new, 2) != first
        assert numbers.of("text", old, 2) == first


def test_a_copy_is_nobody_elses_and_the_callers_tensor_is_not_kept() -> None:
    numbers, text = ContentNumbers(), torch.zeros(1000)
    copy = numbers.copy_of("text", text, 2)
    assert copy.untyped_storage().data_ptr() != text.untyped_storage().data_ptr()
    assert numbers.copy_of("text", text.clone(), 2) is copy is numbers.known(numbers.of("text", text, 2))
    address = id(text)
    del text
    gc.collect()
    assert all(id(value) != address for value in gc.get_objects() if type(value) is Tensor and value.numel() == 1000)
    view = numbers.copy_of("text", torch.zeros(1000, 1000)[0], 2)
    assert view.untyped_storage().nbytes() == view.nbytes, "and keeps no larger tensor alive"


def test_old_contents_are_forgotten_and_their_numbers_not_given_again() -> None:
    numbers, texts = ContentNumbers(), [torch.full((2,), float(value)) for value in range(4)]
    given = [numbers.of("text", text, 2) for text in texts]
    assert len(set(given)) == 4
    assert numbers.of("text", texts[2], 2) == given[2]
    assert numbers.of("text", texts[0], 2) not in given
    numbers.clear()
    assert numbers.of("text", texts[2], 2) not in given


def test_on_a_cpu_nothing_is_put_off() -> None:
    numbers, text, later = ContentNumbers(), torch.zeros(2), Later()
    first = numbers.of("text", text, 2, later)
    text.data.add_(1)
    assert numbers.of("text", text, 2, later) != first and not later.pairs


class _OnADevice(Tensor):
    """A tensor that says it is on a CUDA device."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize("device", ["stand-in", CUDA])
def test_on_a_gpu_a_comparison_waits_for_the_launch_and_its_outcome_is_an_error(device: str) -> None:
    def on_device(value: Tensor) -> Tensor:
        return value.as_subclass(_OnADevice) if device == "stand-in" else value.cuda()

    numbers, later, checks = ContentNumbers(), Later(), DeferredChecks()
    forgotten: list[bool] = []
    text = on_device(torch.zeros(2))
    first = numbers.of("text", text, 2, later)
    assert not later.pairs, "contents nobody has seen yet are compared at once"
    assert numbers.of("text", text, 2, later) == first and len(later.pairs) == 1
    _defer(later, checks, forgotten)
    text.add_(1)
    second = numbers.of("text", text, 2, later)
    assert second != first and not later.pairs, "torch has seen the write"
    text.data.add_(1)
    assert numbers.of("text", text, 2, later) == second and len(later.pairs) == 1
    with pytest.raises(RecordingError, match="passed as text was rewritten in the middle of a run"):
        _defer(later, checks, forgotten)
    assert forgotten == [True]
    assert numbers.of("text", text, 2) not in (first, second), "asked at once, it is right at once"


def _defer(later: Later, checks: DeferredChecks, forgotten: list[bool]) -> None:
    plain = Later([(name, known.as_subclass(Tensor), value.as_subclass(Tensor)) for name, known, value in later.pairs])
    later.pairs.clear()
    plain.defer(checks, lambda: forgotten.append(True))
    checks.wait()


def test_copies_that_one_tensor_was_compared_with_are_compared_once() -> None:
    class Counting(DeferredChecks):
        count = 0

        def add(self, wrong: Tensor, error: Callable[[], Exception]) -> None:
            self.count += 1
            super().add(wrong, error)

    alike: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    checks, value, other = Counting(), torch.ones(3), torch.ones(3)
    copies = [value.clone() for _ in range(3)]

    def compared(*pairs: tuple[Tensor, Tensor]) -> int:
        before = checks.count
        Later([("text", *pair) for pair in pairs], alike).defer(checks, lambda: None)
        return checks.count - before

    assert compared((copies[0], value), (copies[1], value)) == 2
    assert compared((copies[0], value), (copies[1], value)) == 1, "one tells for both"
    assert compared((copies[0], other), (copies[1], other)) == 1, "whatever it is compared with"
    assert compared((copies[0], value), (copies[1], other)) == 2, "they are two tensors now"
    assert compared((copies[0], value), (copies[2], value)) == 2
    copies[1].add_(1)  # nobody does; it would not be seen
    assert compared((copies[0], value), (copies[1], value)) == 1
    value.data.add_(1)
    with pytest.raises(RecordingError, match="passed as text was rewritten"):
        compared((copies[0], value), (copies[1], value))
