"""What holds the slots of one recorded call: the interface between those who read a recording and where it lies.

A session announces the next call (:meth:`SlotStore.prefetch`), reads slots by name or by address, and knows nothing
else: which memory a slot is in, and when it moves, is the store's decision.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from fisedit_compiler.errors import RecordingError
from fisedit_compiler.recordings.stores.addresses import SlotAddresses, SlotLayout


class SlotStore(Mapping[str, Tensor]):
    """The slots of one call by name. As a mapping it gives what :meth:`read` gives.

    Slots do not change. Whoever reads one does not write to it: it may be the store's own tensor.
    Several runs may read a store at once, in threads, and each announces its own calls.
    """

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One slot, on the device that it was recorded on. Good for as long as the reader holds it.

        Raises:
            RecordingError: there is no such slot.
        """

    @abstractmethod
    def addresses(self, layout: SlotLayout, device: torch.device) -> SlotAddresses:
        """Where the slots of ``layout`` lie, for kernels that read them through a table of addresses.

        The answer holds the memory it points to, so the reader keeps it until what reads through it is launched. The
        store gives the same table again only if there is still the same behind it.

        Args:
            layout: strides by slot name. A slot of others is copied.
            device: where the table is read.

        Raises:
            RecordingError: there is no such slot.
        """

    @abstractmethod
    def prefetch(self, call: int) -> None:
        """The call whose slots these are comes next, or next but one: bring near what takes time to bring.

        A hint, given once for every call of a run, before the call's slots are read; without it reading takes longer
        and gives the same. It returns without waiting.

        Args:
            call: which one it is of the run that reads, from 0: of all calls that are announced, the one of the lowest
                number is needed first.
        """

    def settle(self) -> None:
        """Let go of what is held only until somebody asks for it. Nothing, for most stores."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the slots take, those that other stores hold as well included; each tensor counts once."""

    @property
    @abstractmethod
    def own_nbytes(self) -> int:
        """Bytes of them that this store added: of a view what it does not share with the store it is a view of."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is kept alive by this store; one may come more than once."""

    @abstractmethod
    def only(self, names: Iterable[str]) -> SlotStore:
        """The same slots, of these names only. It does not keep the others alive.

        Raises:
            RecordingError: there is no such slot.
        """

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self.read(name)

    def missing(self, name: str) -> RecordingError:
        """The error for a slot that is not there."""
        return RecordingError(
            f"The recorded call has no slot {name!r}; it has {len(self)} slots. Slots are named after the places in "
            "the model that an edit reads from: list(call.slots) names them."
        )


def distinct_nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
