"""The text of score modifiers in a kernel, and the arguments that carry their data.

Scores are multiplied by `scale` first, which then holds no log2(e): modifiers are defined on
natural units. `scores` is [BLOCK_M, keys]; p, row and k tell where.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from maskdsl.codegen.listing import Parameter
from maskdsl.scores import ALiBi, Bias, RelativePosition, ScoreMod, SinkLogits, Softcap

LOG2_E = "1.4426950408889634"
FULL = 'live = scores != float("-inf")  # a bias may take a pair away'
HELPERS = '''@triton.jit
def tanh(x):
    """Exact to the rounding of 1, in exp2: there is no tanh in the interpreter."""
    small = tl.math.exp2(tl.abs(x) * -2.8853900817779268)
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


'''


def score_parameters(scores: tuple[ScoreMod, ...]) -> list[Parameter]:
    """The arguments of all modifiers, in order."""
    found = []
    for i, mod in enumerate(scores):
        name = f"score{i}"
        if isinstance(mod, (ALiBi, SinkLogits)):
            found.append(Parameter(f"{name}_heads", True))
        if isinstance(mod, Bias):
            found.append(Parameter(f"{name}_bias", True))
            found += [Parameter(f"{name}_stride_{d}", False) for d in "bhlk"]
        if isinstance(mod, RelativePosition):
            found += [Parameter(f"{name}_table", True), Parameter(f"{name}_stride_h", False)]
    return found


def score_arguments(scores: tuple[ScoreMod, ...], data: dict[str, Any], heads: int,
                    device: torch.device) -> dict[str, Any]:
    """Their values for one call."""
    found: dict[str, Any] = {}
    for i, mod in enumerate(scores):
        name, tensor = f"score{i}", data.get(mod.name)
        if isinstance(mod, ALiBi):
            found[f"{name}_heads"] = slope_table(mod.for_heads(heads), device)
        elif tensor is None:
            continue
        elif isinstance(mod, SinkLogits):
            found[f"{name}_heads"] = tensor.contiguous()
        elif isinstance(mod, Bias):
            found[f"{name}_bias"] = tensor
            for d, letter in enumerate("bhlk"):
                found[f"{name}_stride_{letter}"] = tensor.stride(d) if tensor.shape[d] > 1 else 0
        else:
            table = tensor.contiguous()
            found |= {f"{name}_table": table,
                      f"{name}_stride_h": table.stride(0) if table.shape[0] > 1 else 0}
    return found


@lru_cache(maxsize=64)
def slope_table(slopes: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """float32 tensor of slopes, kept for later calls."""
    return torch.tensor(slopes, dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class Spots:
    """How a kernel calls the positions, rows and keys of its scores; each text broadcasts."""

    p: str = "p"
    row: str = "row[:, None]"
    k: str = "k"


def score_lines(scores: tuple[ScoreMod, ...], at: Spots = Spots(),
                keep: bool = False) -> tuple[str, ...]:
    """Lines that turn raw scores into modified ones; keep: what `back_lines` needs is left in
    variables."""
    p, row, k = at.p, at.row, at.k
    lines = ["scores = scores * scale"]
    for i, mod in enumerate(scores):
        name = f"score{i}"
        if isinstance(mod, Softcap) and keep:
            lines += [f"{name}_tanh = tanh(scores * {1 / mod.cap!r})  # {mod!r}",
                      f"scores = {mod.cap!r} * {name}_tanh"]
        elif isinstance(mod, Softcap):
            lines.append(f"scores = {mod.cap!r} * tanh(scores * {1 / mod.cap!r})  # {mod!r}")
        elif isinstance(mod, ALiBi):
            lines.append(f"scores = scores + tl.load({name}_heads + head) * ({k} - {p})  # ALiBi")
        elif isinstance(mod, Bias):
            lines += [f"# {mod!r}",
                      f"{name}_row = {name}_bias + batch.to(tl.int64) * {name}_stride_b + "
                      f"head.to(tl.int64) * {name}_stride_h + "
                      f"{row}.to(tl.int64) * {name}_stride_l",
                      f"scores = scores + tl.load({name}_row + {k}.to(tl.int64) * {name}_stride_k,",
                      f"                          mask=({row} < q_len) & ({k} >= 0) & "
                      f"({k} < kv_len), other=0.0).to(tl.float32)"]
        elif isinstance(mod, RelativePosition):
            reach = mod.reach
            lines += [f"{name}_place = tl.minimum(tl.maximum({k} - {p}, -{reach}), {reach}) "
                      f"+ {reach}  # {mod!r}",
                      f"scores = scores + tl.load({name}_table + head * {name}_stride_h + "
                      f"{name}_place).to(tl.float32)"]
    return tuple(lines)


def weight_text(scores: tuple[ScoreMod, ...], axis: str, tested: bool) -> str:
    """The line that makes probabilities of scores and the lse; modified scores are scaled already.

    tested  `live` tells the pairs that have one; the score of a dead pair may lie far above the lse
    """
    power = f"scores * {LOG2_E if scores else 'scale_log2'} - lse{axis}"
    if tested:
        power = f'tl.where(live, {power}, float("-inf"))'
    return f"weights = tl.math.exp2({power})"


def back_lines(scores: tuple[ScoreMod, ...], ends: bool = False,
               upto: int = -1) -> tuple[str, ...]:
    """Lines that lead `grad_scores` back from modified scores to scaled ones.

    ends  add what the two ends of a table of distances get to the rows' sums
    upto  stop before modifier `upto`: the gradient of what it added
    """
    lines = []
    for i, mod in reversed(tuple(enumerate(scores))):
        if i == upto:
            break
        if isinstance(mod, Softcap):
            lines.append(f"grad_scores = grad_scores * (1.0 - score{i}_tanh * score{i}_tanh)")
        elif isinstance(mod, RelativePosition) and ends:
            lines += [f"score{i}_{end} += tl.sum(tl.where(k - p {far}, grad_scores, 0.0), 1)"
                      for end, far in (("low", f"<= -{mod.reach}"),
                                       ("high", f">= {max(mod.reach, 1)}"))]
    return tuple(lines)


def sink_lines(scores: tuple[ScoreMod, ...]) -> tuple[str, ...]:
    """Lines that add the sink logit to the softmax's state, after all keys."""
    for i, mod in enumerate(scores):
        if isinstance(mod, SinkLogits):
            return (f"# {mod!r}: a logit in the denominator that has no value",
                    f"sink = tl.load(score{i}_heads + head).to(tl.float32) * {LOG2_E}",
                    "new_peak = tl.maximum(peak, sink)",
                    'shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
                    "decay = tl.math.exp2(peak - shift)",
                    "total = total * decay + tl.math.exp2(sink - shift)",
                    "acc = acc * decay[:, None]",
                    "peak = new_peak")
    return ()
