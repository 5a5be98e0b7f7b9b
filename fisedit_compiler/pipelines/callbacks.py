"""What diffusers calls after every step of a run, as everything here that makes or wraps such a function types it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
StepCallback = Callable[[Any, int, Any, Tensors], Tensors]
"""``callback(pipe, step, timestep, tensors)``: sees the latents after a step and returns those to go on with."""
