"""What is compared: causal masks of sinks, a window and last queries, and the calls they run in.

One small family holds every row of the comparison, so that each peer can say in a line what it can
express, and so that its plan can be built by the peer's own shortest way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import DIM, HEADS, KV_HEADS
from maskdsl import Causal, Full, LastQ, Mask, Shape, Sink, Window
from maskdsl.tiles import count_pairs

DENSE_KEY = "dense"
SHORT, LONG, LONGEST = 32768, 131072, 524288
DEFAULT_DIM = DIM
NAME = re.compile(r"(?:sink-(?P<s>\d+)-)?window-(?P<w>\d+)"
                  r"|triangle-(?P<ts>\d+)-(?P<tw>\d+)-(?P<tn>\d+)")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Key k is live for query p if k <= p and (k < sink, or p - k < window, or p >= L - last).

    sink, last  tokens, 0 for none
    window      tokens, the query itself included; None for dense causal attention
    """

    sink: int = 0
    window: int | None = None
    last: int = 0

    @property
    def key(self) -> str:
        """The name on the command line: dense, window-W, sink-S-window-W, triangle-S-W-N."""
        if self.window is None:
            return DENSE_KEY
        if self.last:
            return f"triangle-{self.sink}-{self.window}-{self.last}"
        return f"sink-{self.sink}-window-{self.window}" if self.sink else f"window-{self.window}"

    @property
    def mask(self) -> Mask:
        """The same in the mask language (`Causal()` is added by `compile`)."""
        if self.window is None:
            return Full()
        mask: Mask = Window(self.window)
        if self.sink:
            mask = Sink(self.sink) | mask
        return mask | LastQ(self.last) if self.last else mask

    def pairs(self, length: int) -> int:
        """Live pairs of one head of a square call."""
        return count_pairs(Causal() & self.mask, Shape(length, length))

    def live(self, length: int, first: int, stop: int,
             device: torch.device | str) -> torch.Tensor:
        """The rows first..stop of the mask itself, bool[stop - first, length]."""
        p = torch.arange(first, stop, device=device)[:, None]
        k = torch.arange(length, device=device)[None]
        live = torch.ones_like(p + k, dtype=torch.bool) if self.window is None else \
            (k < self.sink) | (p - k < self.window) | (p >= length - self.last)
        return live & (k <= p)

    def intervals(self, length: int, device: torch.device | str) -> torch.Tensor:
        """The live keys of each query as [0, F0) | [F1, F2), sorted and disjoint: int32[F, length]
        with F = 1 for dense causal attention and 3 otherwise."""
        stop = torch.arange(1, length + 1, device=device, dtype=torch.int32)
        if self.window is None:
            return stop[None].contiguous()
        sink = stop.clamp(max=self.sink)
        start = torch.maximum(stop - self.window, sink)
        if self.last:
            for bound in (sink, start):
                bound[-self.last:] = stop[-self.last:]
        return torch.stack((sink, start, stop)).contiguous()

    def tiles(self, length: int, tile: int,
              device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """(live, full) of square tiles, bool[Lq / tile, Lk / tile].

        A tile is full if one of the parts alone keeps all its pairs: a tile that only a union of
        parts fills counts as partial, which costs a mask and no error.
        """
        first = torch.arange(0, length, tile, device=device)
        final = (first + tile).clamp(max=length) - 1
        p0, p1, k0, k1 = first[:, None], final[:, None], first[None], final[None]
        reached, before = k0 <= p1, k1 <= p0
        if self.window is None:
            return reached, before & reached
        live = (k0 < self.sink) | ((p0 - k1).clamp(min=0) < self.window) | \
            (p1 >= length - self.last)
        full = (k1 < self.sink) | (p1 - k0 < self.window) | (p0 >= length - self.last)
        return live & reached, full & before


def parse_pattern(name: str) -> Pattern:
    """The pattern of a name such as triangle-64-1024-128; ValueError for any other text."""
    if name == DENSE_KEY:
        return Pattern()
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no mask: write dense, window-W, sink-S-window-W or "
                         "triangle-S-W-N, sizes in tokens")
    if found["tw"]:
        return Pattern(int(found["ts"]), int(found["tw"]), int(found["tn"]))
    return Pattern(int(found["s"] or 0), int(found["w"]))


@dataclass(frozen=True, slots=True)
class Case:
    """One call: a square forward pass of `length` tokens, batch 1, bfloat16.

    value_dim  head dimension of the values where it is another than that of the keys, else 0
    """

    pattern: Pattern
    length: int
    heads: int = HEADS
    kv_heads: int = KV_HEADS
    dim: int = DIM
    value_dim: int = 0

    def at(self, pattern: Pattern, length: int) -> Case:
        """The same heads with another mask and length."""
        return replace(self, pattern=pattern, length=length)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The arguments of `make_inputs`."""
        sizes = (self.length, self.heads, self.kv_heads, self.dim)
        return (*sizes, self.value_dim) if self.value_dim else sizes

    @property
    def pair_flops(self) -> float:
        """Floating-point operations of one live pair of one head."""
        return 2.0 * (self.dim + (self.value_dim or self.dim))

    def flops(self) -> float:
        """Floating-point operations of the live pairs of all heads."""
        return self.pair_flops * self.heads * self.pattern.pairs(self.length)

    def columns(self) -> dict[str, object]:
        """What every row of this case begins with."""
        return {"mask": self.pattern.key, "length": self.length,
                "heads": f"{self.heads}/{self.kv_heads}",
                "dim": f"{self.dim}/{self.value_dim}" if self.value_dim else self.dim}


TRIANGLES = (Pattern(64, 1024, 128), Pattern(8, 512, 128))
DEFAULT_CASES: tuple[Case, ...] = (
    Case(Pattern(), SHORT),
    *(Case(pattern, length) for pattern in TRIANGLES for length in (SHORT, LONG)),
    Case(Pattern(window=1024), LONG),
    Case(Pattern(4, 2048, 64), LONG),
    Case(TRIANGLES[0], LONG, heads=4, kv_heads=1),
    Case(TRIANGLES[0], LONGEST),
)


def parse_length(text: str) -> int:
    """32768, 32K or 1M tokens."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:].upper(), 1)
    return int(text if unit == 1 else text[:-1]) * unit


def parse_heads(text: str) -> tuple[int, int]:
    """(query heads, key/value heads) of 32:8."""
    heads, kv_heads = map(int, text.split(":"))
    return heads, kv_heads


def parse_dim(text: str) -> tuple[int, int]:
    """(head dimension, that of the values or 0 for the same) of 128 or 192:128."""
    dim, _, value_dim = text.partition(":")
    return int(dim), int(value_dim or 0)


def choose_cases(only: Sequence[str], lengths: Sequence[int], heads: Sequence[tuple[int, int]],
                 dims: Sequence[tuple[int, int]]) -> list[Case]:
    """The cases a command line asks for: the default rows, those of some masks, or (with any of
    lengths, heads, dims) every combination. An empty sequence is "not given"."""
    patterns = [parse_pattern(name) for name in only] or \
        list(dict.fromkeys(case.pattern for case in DEFAULT_CASES))
    if not (lengths or heads or dims):
        defaults = [case for case in DEFAULT_CASES if case.pattern in patterns]
        known = {case.pattern for case in defaults}
        return defaults + [Case(p, n) for p in patterns if p not in known for n in (SHORT, LONG)]
    return [Case(pattern, length, *pair, *dim) for pattern in patterns
            for length in lengths or (SHORT, LONG) for pair in heads or ((HEADS, KV_HEADS),)
            for dim in dims or ((DIM, 0),)]
