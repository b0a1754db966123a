"""Register tensors, pointers and shared memory of an emulated Gluon program, on numpy.

Values have the dtypes of the language (its own objects serve as tags): bfloat16 is kept as rounded
float32, integers wrap as the machine's do, `//` and `%` round towards zero. Shared memory is bytes
under the real layouts, swizzle included, filled with NaN, so a tile that is read as another shape
than it was written in shows in the numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as real

NUMPY = {real.int1: np.bool_, real.int32: np.int32, real.int64: np.int64, real.uint32: np.uint32,
         real.float16: np.float16, real.bfloat16: np.float32, real.float32: np.float32}
RANK = [real.int1, real.int32, real.uint32, real.int64, real.float16, real.bfloat16, real.float32]
TORCH = {torch.int32: real.int32, torch.int64: real.int64, torch.float16: real.float16,
         torch.bfloat16: real.bfloat16, torch.float32: real.float32, torch.bool: real.int1}


def round_bfloat16(x: Any) -> Any:
    """float32 rounded to the nearest bfloat16, kept as float32."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).bfloat16().float().numpy() \
        .reshape(np.shape(x))


class Tensor:
    """A tensor in registers; a scalar where it has no dimensions."""

    def __init__(self, data: Any, dtype: Any, layout: Any = None) -> None:
        self._data, self.dtype, self.layout = np.asarray(data, dtype=NUMPY[dtype]), dtype, layout

    @property
    def data(self) -> Any:
        return self._data

    @property
    def shape(self) -> list[int]:
        return list(self._data.shape)

    @property
    def type(self) -> Tensor:
        return self  # of a type only the layout is asked

    def to(self, dtype: Any) -> Tensor:
        if dtype is real.bfloat16:
            return Tensor(round_bfloat16(self.data), dtype, self.layout)
        with np.errstate(all="ignore"):
            return Tensor(self.data.astype(NUMPY[dtype]), dtype, self.layout)

    def reshape(self, shape: Any) -> Tensor:
        return Tensor(self.data.reshape([int(n) for n in shape]), self.dtype)

    def permute(self, order: Any) -> Tensor:
        return Tensor(np.transpose(self.data, order), self.dtype)

    def trans(self) -> Tensor:
        return Tensor(self.data.T, self.dtype)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        assert self.data.ndim == 0, "a tensor where a number is needed"
        return int(self.data)

    __int__ = __index__

    def __neg__(self) -> Tensor:
        return Tensor(-self.data, self.dtype, self.layout)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data, self.dtype, self.layout)


def lift(x: Any, like: Any = None) -> Tensor:
    """A Python number as a tensor, of the other operand's dtype where that holds it."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, bool | np.bool_):
        return Tensor(x, real.int1)
    floats = (real.float16, real.bfloat16, real.float32)
    if isinstance(x, float):
        return Tensor(x, like.dtype if like is not None and like.dtype in floats else real.float32)
    if like is not None and like.dtype is not real.int1:
        return Tensor(x, like.dtype)
    return Tensor(x, real.int32 if -(1 << 31) <= x < 1 << 31 else real.int64)


def pair(a: Any, b: Any) -> tuple[Any, Any, Any, Any]:
    """Data of two operands in their common dtype, that dtype, and a layout."""
    a = lift(a, b if isinstance(b, Tensor) else None)
    b = lift(b, a)
    dtype = max(a.dtype, b.dtype, key=RANK.index)
    kind = NUMPY[dtype]
    return a.data.astype(kind), b.data.astype(kind), dtype, a.layout or b.layout


def elementwise(function: Callable[[Any, Any], Any], answer: Any = None) -> Callable[..., Tensor]:
    """An operator of two tensors; its result has dtype `answer` or the operands'."""
    def run(a: Any, b: Any) -> Tensor:
        x, y, dtype, layout = pair(a, b)
        with np.errstate(all="ignore"):
            made = Tensor(function(x, y), answer or dtype, layout)
        return made.to(dtype) if dtype is real.bfloat16 and answer is None else made
    return run


def quotient(a: Any, b: Any) -> Any:
    """Division of integers as the machine does it, towards zero."""
    assert np.all(b != 0), "a division by zero"
    return np.trunc(a / b.astype(np.float64)).astype(a.dtype)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": elementwise(operator.add), "sub": elementwise(operator.sub),
    "mul": elementwise(operator.mul), "truediv": elementwise(operator.truediv),
    "floordiv": elementwise(quotient), "mod": elementwise(lambda a, b: a - quotient(a, b) * b),
    "and": elementwise(operator.and_), "or": elementwise(operator.or_),
    "xor": elementwise(operator.xor), "lshift": elementwise(operator.lshift),
    "rshift": elementwise(operator.rshift)}
COMPARISONS = {name: elementwise(getattr(operator, name), real.int1)
               for name in ("lt", "le", "gt", "ge", "eq", "ne")}
for _name, _run in OPERATORS.items():
    setattr(Tensor, f"__{_name}__", lambda a, b, run=_run: run(a, b))
    setattr(Tensor, f"__r{_name}__", lambda a, b, run=_run: run(b, a))
for _name, _run in COMPARISONS.items():
    setattr(Tensor, f"__{_name}__", lambda a, b, run=_run: run(a, b))
Tensor.__hash__ = object.__hash__  # type: ignore[method-assign]


class Pointer:
    """A pointer into a tensor's memory, or a tensor of them."""

    def __init__(self, memory: torch.Tensor, place: Any = 0) -> None:
        self.memory, self.place, self.dtype = memory, np.asarray(place), TORCH[memory.dtype]

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.place + lift(offset).data.astype(np.int64))

    def where(self, mask: Any) -> tuple[Any, Any]:
        keep = np.broadcast_to(lift(mask).data, np.broadcast_shapes(
            self.place.shape, lift(mask).data.shape))
        place = np.broadcast_to(self.place, keep.shape)
        inside = (place >= 0) & (place < self.memory.numel())
        assert (inside | ~keep).all(), "global memory is touched out of bounds"
        return np.where(keep, place, 0), keep

    def load(self, mask: Any = True, other: Any = 0) -> Tensor:
        place, keep = self.where(mask)
        found = self.memory[torch.from_numpy(np.array(place))]
        data = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
        return Tensor(np.where(keep, data, lift(other).data), self.dtype)

    def store(self, value: Any, mask: Any = True) -> None:
        place, keep = self.where(mask)
        value = np.broadcast_to(lift(value).to(self.dtype).data, keep.shape)
        self.memory[torch.from_numpy(place[keep])] = torch.from_numpy(
            np.array(value[keep])).to(self.memory.dtype)

    def add(self, value: Any, mask: Any = True) -> Tensor:
        """An atomic add; returns what was there."""
        old = self.load(mask)
        place, keep = self.where(mask)
        value = np.broadcast_to(lift(value).to(self.dtype).data, keep.shape)
        self.memory.index_add_(0, torch.from_numpy(place[keep].ravel()),
                               torch.from_numpy(np.array(value[keep]).ravel()))
        return old


def bytes_of(dtype: Any) -> int:
    """Bytes of an element."""
    return int(dtype.primitive_bitwidth) // 8


@lru_cache(maxsize=4096)
def places(shape: tuple[int, ...], size: int, swizzle: int) -> Any:
    """The byte at which each element of a block begins. Rows are cut into lines of `swizzle`
    bytes, all rows of a line lie together, and 16-byte pieces trade places within eight rows."""
    columns, rows = shape[-1], int(np.prod(shape[:-1]))
    if not swizzle:
        return (np.arange(rows * columns) * size).reshape(shape)
    line = swizzle // size
    r, c = np.arange(rows)[:, None], np.arange(columns)[None, :]
    at = ((c // line) * rows + r) * swizzle + (c % line) * size
    at = at ^ ((at >> 7 & (swizzle // 16 - 1)) << 4)
    return at.reshape(shape)


class Shared:
    """A piece of shared memory."""

    def __init__(self, machine: Any, base: int, dtype: Any, shape: list[int], layout: Any,
                 turned: bool = False, pieces: int = 0) -> None:
        self.machine, self.base, self.dtype, self.layout = machine, base, dtype, layout
        self.shape, self.turned, self.pieces = [int(n) for n in shape], turned, pieces
        self.whole, self.first_row = self.shape, 0  # of a tile of which this is some rows

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * bytes_of(self.dtype)

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < self.shape[0], "a slot that is not there"
        step = self.nbytes // self.shape[0]
        return Shared(self.machine, self.base + int(i) * step, self.dtype, self.shape[1:],
                      self.layout)

    def slice(self, start: int, length: int) -> Shared:
        assert start + length <= self.shape[0]
        if len(self.shape) == 2:
            made = Shared(self.machine, self.base, self.dtype, [length, self.shape[1]], self.layout)
            made.whole, made.first_row = self.shape, start
            return made
        return Shared(self.machine, self.base + start * bytes_of(self.dtype), self.dtype, [length],
                      self.layout)

    def permute(self, order: Any) -> Shared:
        assert tuple(order) == (1, 0)
        return Shared(self.machine, self.base, self.dtype, self.shape, self.layout, not self.turned)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        made = Shared(self.machine, self.base, dtype, shape, layout)
        assert made.nbytes <= self.nbytes and not self.turned, "more than was allocated"
        return made

    def at(self) -> Any:
        """Indices of the elements in units of their size."""
        swizzle = getattr(self.layout, "swizzle_byte_width", 0)
        size = bytes_of(self.dtype)
        assert not swizzle or self.base % 1024 == 0, "a swizzled tile begins at 1024 bytes"
        found = (self.base + places(tuple(self.whole), size, swizzle)) // size
        return found[self.first_row:self.first_row + self.shape[0]]

    def read(self) -> Any:
        """Its elements as numbers."""
        raw = self.machine.view(self.dtype)[self.at()]
        if self.dtype is real.bfloat16:
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.T if self.turned else raw

    def write(self, data: Any) -> None:
        data = np.asarray(data).reshape(self.shape)
        if self.dtype is real.bfloat16:
            data = (np.ascontiguousarray(data, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        self.machine.view(self.dtype)[self.at()] = data

    def load(self, layout: Any = None) -> Tensor:
        """By the threads of a warp group."""
        return Tensor(self.read(), self.dtype, layout)

    def store(self, value: Tensor) -> None:
        """By the threads of a warp group: the copy engine and the tensor cores see it only behind
        a fence."""
        assert value.dtype is self.dtype, f"{value.dtype} into memory of {self.dtype}"
        self.write(value.data)
        self.machine.unfenced(self.base, self.base + self.nbytes)
