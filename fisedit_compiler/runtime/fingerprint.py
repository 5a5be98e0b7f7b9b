"""Two fingerprints of a module: what a program was compiled for, and what a recording was made with.

*Structure* is everything that changes the graph: module classes, plain attributes (LoRA scales among them), names,
shapes and dtypes of parameters. *Weights* are cheap checksums of parameter values, so that a fused LoRA or another
checkpoint is noticed even when it was written through ``.data``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def structure_key(module: nn.Module) -> str:
    """Hex digest of a module's structure. A few milliseconds for SD-sized UNets."""
    digest = hashlib.sha256()
    for path, part in module.named_modules():
        digest.update(f"{path}:{type(part).__module__}.{type(part).__qualname__}".encode())
        for name in sorted(vars(part)):
            if not name.startswith("_"):
                for item in _plain(name, vars(part)[name]):
                    digest.update(item.encode())
        for name, parameter in (*part._parameters.items(), *part._buffers.items()):
            if parameter is not None:
                digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{parameter.device.type}".encode())
    digest.update(repr(getattr(module, "config", "")).encode())
    return digest.hexdigest()


def _plain(name: str, value: Any) -> Iterator[str]:
    """Plain attributes as text; of any other object its class, which tells attention processors apart."""
    if isinstance(value, _PLAIN):
        yield f"{name}={value!r}"
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _plain(f"{name}.{index}", item)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _plain(f"{name}.{key}", value[key])
    else:
        yield f"{name}:{type(value).__module__}.{type(value).__qualname__}"


def weights_key(module: nn.Module) -> tuple[str, tuple[float, ...]]:
    """Structure digest and one checksum per parameter and buffer (its 2-norm, float32).

    Reads every weight once: about 10 ms for 23 M parameters on two cores, under a millisecond on a GPU.
    """
    structure = structure_key(module)
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return structure, ()
    with torch.no_grad():
        norms = torch._foreach_norm(tensors, 2)
        values: list[float] = torch.stack([norm.float().to(norms[0].device) for norm in norms]).tolist()
    return structure, tuple(values)
