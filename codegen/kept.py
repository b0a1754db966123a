"""What outlives the call it is made in."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Tensor = torch.Tensor
Key = TypeVar("Key")
Value = TypeVar("Value")
MOST = 256  # values remembered of one thing


def remember(known: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """known[key], made where it is new; before there are too many, all are forgotten."""
    if key not in known:
        if len(known) >= MOST:
            known.clear()
        known[key] = make()
    return known[key]


def make_kept(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What `make` returns, ready for every stream.

    On a GPU a thread of its own makes it. What the calling thread allocates while `torch.compile`
    prepares a CUDA graph comes from the graph's memory, and whatever is still there after the call
    is an error ("tensors in the cudagraph pool not tracked as outputs").
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make()  # what a capture makes belongs to its graph, and lives as long

    def work() -> Tensor:
        made = make()
        torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@lru_cache(maxsize=64)
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of one entry, for a pointer that a launch does not use."""
    return make_kept(lambda: torch.empty(1, dtype=dtype, device=device), device)
