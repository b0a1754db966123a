"""Names of `gluon.language` on numpy, for `gluon_threads`: layouts are nothing here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class Tensor(np.ndarray):  # type: ignore[type-arg]
    """A register tensor."""

    type = SimpleNamespace(layout=None)

    def to(self, kind: Any) -> Any:
        return tensor(np.asarray(self).astype(np.int64)) if kind == "int" else self


def tensor(x: Any) -> Any:
    return np.asarray(x).view(Tensor)


class Pointer:
    """A pointer into flat memory."""

    def __init__(self, memory: Any, place: Any = 0) -> None:
        self.memory, self.place = memory, place

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.place + np.asarray(offset))


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Any:
    place = np.asarray(pointer.place)
    keep = np.broadcast_to(mask, np.broadcast_shapes(place.shape, np.shape(mask)))
    place = np.where(keep, place, 0)
    assert ((place >= 0) & (place < len(pointer.memory)))[keep].all(), "a load out of bounds"
    found = np.where(keep, pointer.memory[np.clip(place, 0, len(pointer.memory) - 1)], other)
    return tensor(found) if found.ndim else found[()]


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    place, value, keep = np.broadcast_arrays(np.asarray(pointer.place), np.asarray(value), mask)
    pointer.memory[place[keep]] = value[keep]


def language(lock: Any, programs: int) -> SimpleNamespace:
    """The names of `gluon.language` that kernels use."""
    def layout(*_: Any, **__: Any) -> None:
        return None

    def add(pointer: Pointer, value: int) -> int:
        with lock:
            old = int(pointer.memory[pointer.place])
            pointer.memory[pointer.place] = old + value
            return old

    return SimpleNamespace(
        constexpr=lambda x: x, static_range=range, to_tensor=lambda x: x, int32="int",
        int64="long", float32="float", uint32="uint", program_id=lambda _: 0,
        num_programs=lambda *_: programs, num_warps=lambda *_: 4, atomic_add=add,
        load=load, store=store,
        arange=lambda a, b, layout=None: tensor(np.arange(a, b)),
        full=lambda shape, x, dtype=None, layout=None: tensor(np.full(shape, x)),
        zeros=lambda shape, dtype=None, layout=None: tensor(
            np.zeros(shape, np.int64 if dtype == "int" else np.float64)),
        where=lambda c, a, b: tensor(np.where(c, a, b)) if np.ndim(np.where(c, a, b)) else
        np.where(c, a, b)[()],
        expand_dims=lambda x, axis: tensor(np.expand_dims(x, axis)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        max=lambda x, axis: tensor(np.max(x, axis)) if np.ndim(x) > 1 else np.max(x, axis),
        sum=lambda x, axis: tensor(np.sum(x, axis)) if np.ndim(x) > 1 else np.sum(x, axis),
        maximum=np.maximum, minimum=np.minimum, exp2=np.exp2, log2=np.log2,
        cdiv=lambda a, b: -(-a // b), cast=lambda x, _: x, BlockedLayout=layout,
        SliceLayout=layout, NVMMADistributedLayout=layout, DotOperandLayout=layout,
        DistributedLinearLayout=layout)
