"""Queries, keys and values of a model's attention layers, taken while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from maskdsl.errors import StudyError

NAMES = ("query", "key", "value")  # the first arguments of scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Layer:
    """What one attention layer computed with.

    q      [B, Hq, Lq, D]
    k, v   [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]; v None where outputs do not matter
    scale  softmax scale; None is D ** -0.5
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None = None
    scale: float | None = None


class Recorder(TorchFunctionMode):
    """Keeps the inputs of every call of scaled_dot_product_attention, in order."""

    def __init__(self, layers: Collection[int] | None, device: torch.device | str | None) -> None:
        super().__init__()
        self.layers, self.device = layers, device
        self.calls = 0
        self.kept: list[Layer] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            if self.layers is None or self.calls in self.layers:
                given = dict(zip(NAMES, args, strict=False)) | kwargs
                q, k, v = (given[name].detach().to(self.device or given[name].device)
                           for name in NAMES)
                self.kept.append(Layer(q, k, v, given.get("scale")))
            self.calls += 1
        return func(*args, **kwargs)


def capture(model: Callable[..., Any], *args: Any, layers: Collection[int] | None = None,
            device: torch.device | str | None = None, **kwargs: Any) -> list[Layer]:
    """Run `model(*args, **kwargs)` once, without gradients, and keep what its attention layers see.

    layers  keep only these calls of attention, from 0; default all. Each takes the memory of its q,
            k and v.
    device  keep them there, "cpu" say; default: where they are

    Works with every model that calls `torch.nn.functional.scaled_dot_product_attention`: those of
    transformers with attn_implementation="sdpa", timm, torch's own layers in training mode. Errors:
    StudyError where it is never called.
    """
    with torch.no_grad(), Recorder(layers, device) as recorder:
        model(*args, **kwargs)
    if not recorder.kept:
        told = f"called it {recorder.calls} times, but none of layers={layers}" if recorder.calls \
            else "never called torch's scaled_dot_product_attention"
        raise StudyError(f"capture({type(model).__name__})", f"the model {told}",
                         'attn_implementation="sdpa", or study([(q, k, v), ...], patterns)')
    kept: list[Layer] = recorder.kept
    return kept
