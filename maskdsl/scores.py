"""Score modifiers: what may be done to the scores of live pairs before the softmax.

Each is declared by name, so that a kernel can be written for it: `Softcap`, `ALiBi`, `Bias`,
`RelativePosition`, and `SinkLogits`, which adds to the softmax's denominator. A list of them is
applied in order, on scores that are already scaled. Tensors come at the call, as for slots:

    attn = compile(Window(1024), scores=[Softcap(50.0), SinkLogits("sinks")])
    out = attn(q, k, v, sinks=model.sinks)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from maskdsl.dynamic import RESERVED, SlotMask
from maskdsl.errors import MissingSlotError, ScoreDataError, ScoreModError
from maskdsl.shape import Shape

Tensor = torch.Tensor
NAMES = "Softcap(50.0), ALiBi(), Bias('bias'), RelativePosition('table', 128), SinkLogits('sinks')"


@dataclass(frozen=True, slots=True)
class ScorePlace:
    """Where scores are: index tensors that broadcast to them, and the call they belong to.

    p is the absolute query position, row = p - q_offset; heads counts query heads.
    """

    batch: Tensor
    head: Tensor
    p: Tensor
    k: Tensor
    q_offset: int
    heads: int


class ScoreMod:
    """A score modifier: base of the classes in this file."""

    __slots__ = ()
    dims: ClassVar[str] = ""  # of the data its slot takes; "" where it takes none

    @property
    def name(self) -> str:
        """The argument of a call that carries its data; "" where it needs none."""
        return getattr(self, "slot", "")

    def apply(self, scores: Tensor, at: ScorePlace, data: Tensor | None) -> Tensor:
        """The modified scores; the meaning that kernels are tested against."""
        raise NotImplementedError

    def check(self, data: Tensor, batch: int, heads: int, shape: Shape) -> str:
        """What is wrong with the sizes of the data, or ""."""
        return ""

    def check_slot(self) -> None:
        """The slot's name can be a keyword argument of a call."""
        slot = self.name
        if not isinstance(slot, str) or not slot.isidentifier() or slot in RESERVED:
            raise ScoreModError(f"{type(self).__name__}({slot!r})", "a name must be an identifier "
                                f"other than {', '.join(RESERVED)}: it becomes an argument of the "
                                "call", f"{type(self).__name__}('bias')")


@dataclass(frozen=True, slots=True)
class Softcap(ScoreMod):
    """s -> cap * tanh(s / cap). Source: Gemma 2, arXiv 2408.00118, section 2 (cap 50)."""

    cap: float

    def __post_init__(self) -> None:
        if isinstance(self.cap, bool) or not isinstance(self.cap, (int, float)) or \
                not (math.isfinite(self.cap) and self.cap > 0):
            raise ScoreModError(f"Softcap({self.cap!r})", "the cap must be a finite number > 0",
                                "Softcap(50.0)")
        object.__setattr__(self, "cap", float(self.cap))

    def apply(self, scores: Tensor, at: ScorePlace, data: Tensor | None) -> Tensor:
        return torch.tanh(scores / self.cap) * self.cap


@dataclass(frozen=True, slots=True)
class ALiBi(ScoreMod):
    """s -> s + slope[head] * (k - p).

    slopes  one a query head; default the published ones, 2 ** (-8 (h + 1) / H) for a power of two

    Source: Train Short, Test Long, arXiv 2108.12409, section 3, and its code for other numbers of
    heads.
    """

    slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.slopes is None:
            return
        try:
            slopes = tuple(map(float, self.slopes))
        except (TypeError, ValueError):
            slopes = ()
        if not slopes or not all(map(math.isfinite, slopes)):
            raise ScoreModError(f"ALiBi({self.slopes!r})", "not a list of numbers, one for every "
                                "query head", "ALiBi(), or ALiBi([0.5, 0.25])")
        object.__setattr__(self, "slopes", slopes)

    def for_heads(self, heads: int) -> tuple[float, ...]:
        """The slope of every query head."""
        if self.slopes is None:
            return published_slopes(heads)
        if len(self.slopes) != heads:
            raise ScoreDataError(f"{self!r} on {heads} query heads",
                                 f"there are {len(self.slopes)} slopes",
                                 f"{heads} slopes, or ALiBi() for the published ones")
        return self.slopes

    def apply(self, scores: Tensor, at: ScorePlace, data: Tensor | None) -> Tensor:
        slopes = self.table(at.heads, scores.device) if data is None else data
        return scores + slopes[at.head].to(scores.dtype) * (at.k - at.p)

    def table(self, heads: int, device: torch.device | str) -> Tensor:
        """The slopes as float64[heads]."""
        return torch.tensor(self.for_heads(heads), dtype=torch.float64, device=device)


def published_slopes(heads: int) -> tuple[float, ...]:
    """For 2**n heads a geometric series; for others that of the power below, then every other one
    of the power above."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes += [2 ** (-4 * (2 * h + 1) / power) for h in range(heads - power)]
    return tuple(slopes)


@dataclass(frozen=True, slots=True)
class Bias(ScoreMod):
    """s -> s + bias[batch, head, row, k]: a tensor float[B or 1, H or 1, Lq, Lk] at the call.

    It takes memory in the square of the length; -inf takes a pair away.
    """

    slot: str = "bias"
    dims: ClassVar[str] = "B or 1, H or 1, Lq, Lk"

    def __post_init__(self) -> None:
        self.check_slot()

    def check(self, data: Tensor, batch: int, heads: int, shape: Shape) -> str:
        if data.dim() == 4 and data.shape[0] in (1, batch) and data.shape[1] in (1, heads) and \
                data.shape[2:] == (shape.q_len, shape.kv_len):
            return ""
        return f"[{batch}, {heads}, {shape.q_len}, {shape.kv_len}] is needed (1 for batch or heads)"

    def apply(self, scores: Tensor, at: ScorePlace, data: Tensor | None) -> Tensor:
        assert data is not None
        batch = at.batch if data.shape[0] > 1 else at.batch * 0
        head = at.head if data.shape[1] > 1 else at.head * 0
        return scores + data[batch, head, at.p - at.q_offset, at.k].to(scores.dtype)


@dataclass(frozen=True, slots=True)
class RelativePosition(ScoreMod):
    """s -> s + table[head, clip(k - p, -reach, reach) + reach], a table float[H or 1, 2 reach + 1].

    reach  the largest distance the table tells apart, tokens. Buckets (T5) are a table whose
           entries repeat. Source: T5, arXiv 1910.10683, section 2.1.
    """

    slot: str
    reach: int
    dims: ClassVar[str] = "H or 1, 2 * reach + 1"

    def __post_init__(self) -> None:
        self.check_slot()
        if isinstance(self.reach, bool) or not isinstance(self.reach, int) or \
                not 0 <= self.reach < 1 << 29:
            raise ScoreModError(f"RelativePosition({self.slot!r}, {self.reach!r})",
                                "reach must be an integer >= 0, in tokens",
                                f"RelativePosition({self.slot!r}, 128)")

    def check(self, data: Tensor, batch: int, heads: int, shape: Shape) -> str:
        size = 2 * self.reach + 1
        if data.dim() == 2 and data.shape[0] in (1, heads) and data.shape[1] == size:
            return ""
        return f"[{heads}, {size}] is needed, or [1, {size}] for all heads"

    def apply(self, scores: Tensor, at: ScorePlace, data: Tensor | None) -> Tensor:
        assert data is not None
        place = (at.k - at.p).clamp(-self.reach, self.reach) + self.reach
        head = at.head if data.shape[0] > 1 else at.head * 0
        return scores + data[head, place].to(scores.dtype)


@dataclass(frozen=True, slots=True)
class SinkLogits(ScoreMod):
    """A learned logit for every head that takes part in the softmax and has no value: float[H].

    The denominator becomes sum(exp(s)) + exp(sink[head]), and so does the lse. A row without a live
    key gives output 0 and lse sink[head]. Source: gpt-oss, arXiv 2508.10925; not the `Sink` mask.
    """

    slot: str = "sinks"
    dims: ClassVar[str] = "H"

    def __post_init__(self) -> None:
        self.check_slot()

    def check(self, data: Tensor, batch: int, heads: int, shape: Shape) -> str:
        return "" if data.shape == (heads,) else f"[{heads}] is needed, one logit a query head"

    def apply(self, scores: Tensor, at: ScorePlace, data: Tensor | None) -> Tensor:
        return scores  # it changes no pair: see `add_sinks`


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output and lse with a sink logit in the denominator; `sinks` broadcasts to lse."""
    whole = torch.logaddexp(lse, sinks.to(lse.dtype))
    weight = torch.exp(lse - whole.masked_fill(whole == -torch.inf, 0.0))
    return out * weight.unsqueeze(-1), whole


def check_scores(scores: object, slots: tuple[SlotMask, ...]) -> tuple[ScoreMod, ...]:
    """One modifier or several as a tuple; ScoreModError for anything else."""
    if scores is None:
        return ()
    one = isinstance(scores, ScoreMod) or not isinstance(scores, Iterable)
    found: tuple[Any, ...] = (scores,) if one else tuple(scores)  # type: ignore[arg-type]
    if not all(isinstance(s, ScoreMod) for s in found):
        wrote = ", ".join(getattr(s, "__qualname__", repr(s)) for s in found)
        raise ScoreModError(f"scores={wrote}", "a function on scores cannot be compiled: the "
                            "modifiers there are have names", f"a list of {NAMES}")
    names = [s.name for s in found if s.name] + [atom.slot for atom in slots]
    twice = {name for name in names if names.count(name) > 1}
    if twice or sum(isinstance(s, SinkLogits) for s in found) > 1:
        raise ScoreModError(f"scores={list(found)!r}", "two of them want the same data" if twice
                            else "there can be one SinkLogits", "another name for one of them"
                            if twice else "one SinkLogits")
    return found


def check_score_data(scores: tuple[ScoreMod, ...], given: Mapping[str, object], batch: int,
                     heads: int, shape: Shape, device: torch.device) -> None:
    """The data of every modifier fits the call."""
    for mod in scores:
        if isinstance(mod, ALiBi):
            mod.for_heads(heads)
        if not mod.name:
            continue
        data = given.get(mod.name)
        if data is None:
            raise MissingSlotError("attn(q, k, v)", f"{mod!r} needs data at the call",
                                   f"attn(q, k, v, {mod.name}=...), a tensor [{mod.dims}]")
        if not isinstance(data, Tensor) or not data.is_floating_point():
            raise ScoreDataError(f"{mod.name} of {getattr(data, 'dtype', type(data).__name__)}",
                                 "not a floating-point tensor", f"a tensor [{mod.dims}]")
        if wrong := mod.check(data, batch, heads, shape):
            raise ScoreDataError(f"{mod.name} {list(data.shape)} for {mod!r}", wrong,
                                 f"a tensor [{mod.dims}]")
        if data.device != device:
            raise ScoreDataError(f"{mod.name} on {data.device}", f"the call is on {device}",
                                 f"{mod.name}.to({str(device)!r})")


def modify_scores(scores: Tensor, mods: tuple[ScoreMod, ...], at: ScorePlace,
                  data: Mapping[str, Tensor]) -> Tensor:
    """All modifiers of single pairs, in order."""
    for mod in mods:
        scores = mod.apply(scores, at, data.get(mod.name))
    return scores


def score_mod(mods: tuple[ScoreMod, ...], heads: int, data: Mapping[str, Tensor],
              q_offset: int = 0, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
    """The modifiers of pairs as FlexAttention's `score_mod(score, b, h, q_idx, kv_idx)`.

    Every tensor is made before: inductor takes none that a score_mod makes.
    """
    tables = [mod.table(heads, device) if isinstance(mod, ALiBi) else data.get(mod.name)
              for mod in mods]

    def modify(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Any:
        at = ScorePlace(b, h, q_idx + q_offset, kv_idx, q_offset, heads)
        for mod, table in zip(mods, tables, strict=True):
            score = mod.apply(score, at, table)
        return score

    return modify
