"""Model directories are checked before and after diffusers and transformers read them.

Both libraries read pickled weights where there are no others, import whatever library a ``model_index.json`` names, and
fill weights that are missing with random numbers. Here only safetensors are read, only classes of the two libraries are
made, and a weight that is missing is an error. Nothing here knows a particular pipeline.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisedit_compiler.errors import FiseditError, ModelNotFoundError

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""What an index may name; the last is how diffusers calls the home of its safety checker."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NAMED = 3
"""Names of missing weights in a message."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0][:400] if lines else type(error).__name__).rstrip(". ")


@contextmanager
def named_failure(what: str, path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever reading a directory raises into one :class:`ModelNotFoundError` of one line.

    Files of a directory are user input to these libraries, and they raise what they like about them: ``KeyError``,
    ``TypeError``, ``SafetensorError``, ``RuntimeError``.
    """
    try:
        yield
    except FiseditError:
        raise
    except Exception as error:
        reason = _pickled(path) or f"{type(error).__name__}: {first_line(error)}"
        raise ModelNotFoundError(f"the {what} in {path} could not be loaded ({reason}). {remedy}") from error


def _pickled(path: Path) -> str:
    """Which pickles stand where safetensors should, as a reason; empty if there are none."""
    folders = [path, *(folder for folder in sorted(path.iterdir()) if folder.is_dir())] if path.is_dir() else []
    for folder in folders:
        found = next((file for pattern in _PICKLES for file in sorted(folder.glob(pattern))), None)
        if found is not None and not any(folder.glob("*.safetensors")):
            return (
                f"the weights in {folder.name}/{found.name} are pickled: reading them could run code, so only "
                "safetensors are read; convert them with save_pretrained() where you trust them"
            )
    return ""


def read_index(path: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every part that ``model_index.json`` names; parts that are left out are not there.

    Raises:
        ModelNotFoundError: it is no index, or names something that is not of diffusers or transformers.
    """
    file = path / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_index(file, f"it cannot be read: {first_line(error)}") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise _no_index(file, "it names no pipeline class")
    parts: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if not isinstance(value, list) or name.startswith("_"):
            continue
        if value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise _no_index(file, f"{name} is not a library and a class")
        if value[0] not in _LIBRARIES:
            raise _no_index(file, f"{name} is of {value[0]!r}; only parts of diffusers and transformers are loaded")
        parts[name] = (value[0], value[1])
    return parts


def _no_index(file: Path, problem: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{file} is no index of a pipeline: {problem}. Pass a directory written by a diffusers pipeline's "
        "save_pretrained()."
    )


def load_transformers_parts(
    path: Path, parts: dict[str, tuple[str, str]], dtype: torch.dtype, leave_out: tuple[str, ...] = ()
) -> dict[str, nn.Module]:
    """The parts that are models of transformers, such as text encoders, with all of their weights.

    Raises:
        ModelNotFoundError: a weight is missing. Errors of transformers pass through, see :func:`named_failure`.
    """
    import transformers

    loaded: dict[str, nn.Module] = {}
    for name, (library, class_name) in parts.items():
        found = getattr(transformers, class_name, None) if library == "transformers" else None
        if name not in leave_out and isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            loaded[name] = load_transformer(found, path / name, dtype)
    return loaded


def load_transformer(kind: Any, path: Path, dtype: torch.dtype) -> Any:
    """A model of transformers from its directory, from safetensors and with all of its weights.

    Raises:
        ModelNotFoundError: a weight is missing. Errors of transformers pass through, see :func:`named_failure`.
    """
    model, report = kind.from_pretrained(
        str(path), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    _demand_all(path, sorted(report["missing_keys"]))
    return model


def check_complete(path: Path, parts: dict[str, Any]) -> None:
    """That every weight of the parts was in a file: diffusers leaves the others without memory.

    Raises:
        ModelNotFoundError: names the part and what it lacks.
    """
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors = [*part.named_parameters(), *part.named_buffers()]
            _demand_all(path / name, [key for key, tensor in tensors if tensor.is_meta])


def _demand_all(path: Path, missing: list[str]) -> None:
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ModelNotFoundError(
            f"the weights in {path} are incomplete: {', '.join(missing[:_NAMED])}{more} are missing. Copy the files "
            "again, or save the model again with save_pretrained()."
        )
