"""The original module as ``torch.compile`` makes it: what dense calls inside an edit run."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisedit_compiler.compiling import one_at_a_time
from fisedit_compiler.runtime.execution.in_order import InOrder

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")


class DenseModule:
    """The original module as ``torch.compile`` makes it: as fast as a dense call can be expected to be.

    Compiled at the first call and only then. If that fails, here or at a later call, the module itself is called from
    then on. The module is not patched.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._compiled: Any = None
        self._failed = False
        self._in_order = InOrder()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result; its tensors are the caller's own."""
        if self._failed:
            return self.module(*args, **kwargs)
        if self._compiled is None:
            return self._first(*args, **kwargs)
        return self._run(*args, **kwargs)

    @one_at_a_time
    def _first(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None and not self._failed:
            logger.info("compiling the dense call, once per model; this can take a minute")
            # Compiling the module itself would leave an attribute on it.
            self._compiled = torch.compile(self._call, mode="reduce-overhead")
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self._compiled
        if compiled is None:  # it failed meanwhile, in another thread
            return self.module(*args, **kwargs)
        device = next((value.device for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)), CPU)
        try:
            with self._in_order.on(device):
                result = compiled(*args, **kwargs)
                # These live in the memory of a CUDA graph, which the next call writes over, another run's too.
                return pytree.tree_map_only(Tensor, torch.clone, result)
        except Exception as error:
            told, self._failed, self._compiled = self._failed, True, None
            if not told:
                logger.warning("torch.compile cannot run the dense call, it runs eagerly from now on: %s", error)
        return self.module(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
