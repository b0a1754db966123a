"""The same plan with plain torch ops: CPU and anything else torch runs on; differentiable.

Each query tile multiplies only the key ranges its plan visits, and tests the mask only on MASKED
ones. Memory beyond a copy of the output is a few times one tile's scores, not a square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from maskdsl.atoms import Full
from maskdsl.binding import bind_slots
from maskdsl.codegen.lists import group_heads
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan
from maskdsl.dynamic import ListMask
from maskdsl.expr import And, Mask, Not, Or, join
from maskdsl.scores import Bias, ScoreMod, ScorePlace, SinkLogits, add_sinks, modify_scores
from maskdsl.shape import Shape, Site
from maskdsl.simplify import simplify
from maskdsl.trace import is_traceable

# tokens; of 32, 64, 128 and 256 rows the fastest for 16K triangles on a 2-core x86, torch 2.13
BLOCK_M, BLOCK_N = 128, 128
SCORE_LIMIT = 1 << 24  # elements of one tile's scores over all heads, 64 MB in float32

Range = tuple[int, int, bool]  # first key, last key + 1, masked


def plannable(mask: Mask) -> Mask:
    """The mask this backend plans: a superset where a function is opaque."""
    return simplify(widen_opaque(mask))


def torch_plan(mask: Mask) -> Plan:
    """The plan this backend runs: of the mask, or of a superset where a function is opaque."""
    return make_plan(plannable(mask), BLOCK_M, BLOCK_N)


def widen_opaque(mask: Mask) -> Mask:
    """A superset without untraceable functions: opaque & Window(8)  -->  Window(8)."""
    if isinstance(mask, ListMask):
        return Full()
    if isinstance(mask, Not) and isinstance(mask.operand, ListMask):
        return Full()
    if is_traceable(mask) and not has_lists(mask):
        return mask
    if isinstance(mask, Or):
        return join(Or, tuple(map(widen_opaque, mask.args)))
    if isinstance(mask, And):
        return join(And, tuple(map(widen_opaque, mask.args)))
    if isinstance(mask, Not) and isinstance(mask.operand, (Or, And)):
        flipped = tuple(widen_opaque(~arg) for arg in mask.operand.args)
        return join(And, flipped) if isinstance(mask.operand, Or) else join(Or, flipped)
    return Full()


def has_lists(mask: Mask) -> bool:
    """Whether some of the mask's pairs are listed at the call."""
    return any(isinstance(node, ListMask) for node in mask.walk())


class Kind:
    """The heads that share one mask, and how it is walked.

    opaque  tiles say nothing for sure: every key of the plan's tiles is tested
    listed  most of those keys are dead: live ones are picked first
    """

    def __init__(self, heads: tuple[int, ...], mask: Mask) -> None:
        self.heads, self.mask = heads, mask
        self.plan = torch_plan(mask)
        self.listed = has_lists(mask)
        self.opaque = self.listed or not is_traceable(mask)
        self.alone = self.opaque or self.plan.needs_head  # heads cannot be computed together


class TorchForward:
    """Block-sparse attention of one mask with torch ops."""

    def __init__(self, mask: Mask, scores: tuple[ScoreMod, ...] = ()) -> None:
        self.mask, self.scores = mask, scores
        self.kinds = [Kind(heads, one) for heads, one in group_heads(mask)]

    @property
    def plan(self) -> Plan:
        """The plan of the first kind of head."""
        return self.kinds[0].plan

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape,
                scale: float, layout: str, with_lse: bool) -> Callable[..., Any]:
        """A function of (q, k, v, data), in the user's layout, for every call that looks like
        this."""
        turned = layout == "blhd"

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, data: dict[str, Any]) -> Any:
            if turned:
                q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            names = {mod.name for mod in self.scores}
            extra = {name: data[name] for name in names if name}
            bound = bind_slots(self.mask, {n: d for n, d in data.items() if n not in names}, shape)
            out, lse = self.attend(q, k, v, shape, scale, with_lse, bound, extra)
            if turned:
                out = out.transpose(1, 2)
            return (out, lse) if with_lse else out

        return call

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape,
               scale: float, with_lse: bool = True,
               bound: Mapping[str, Any] | None = None,
               data: Mapping[str, torch.Tensor] | None = None) -> tuple[
                   torch.Tensor, torch.Tensor]:
        """Output [B, Hq, Lq, Dv] in the dtype of q, lse [B, Hq, Lq] (or empty); inputs are views
        [B, H, L, D]."""
        call = Run(shape, scale, with_lse, q.shape[1], bound or {}, self.scores, data or {})
        if len(self.kinds) == 1 and not self.kinds[0].alone:
            return attend_kind(self.kinds[0], q, k, v, call, 0, 0)
        group = q.shape[1] // k.shape[1]
        kind_of = {h: kind for kind in self.kinds for h in kind.heads or range(q.shape[1])}
        rows = []
        for b in range(q.shape[0]):
            heads = [attend_kind(kind_of[h], q[b:b + 1, h:h + 1], k[b:b + 1, h // group, None],
                                 v[b:b + 1, h // group, None], call, b, h)
                     for h in range(q.shape[1])]
            rows.append(tuple(torch.cat(parts, 1) for parts in zip(*heads, strict=True)))
        out, lse = (torch.cat(parts, 0) for parts in zip(*rows, strict=True))
        return out, lse


@dataclass(frozen=True, slots=True)
class Run:
    """What all heads of one call share."""

    shape: Shape
    scale: float
    with_lse: bool
    heads: int
    bound: Mapping[str, Any]
    scores: tuple[ScoreMod, ...]
    data: Mapping[str, torch.Tensor]

    @property
    def needs_lse(self) -> bool:
        """Whether rows must tell their lse."""
        return self.with_lse or self.sinks is not None

    @property
    def sinks(self) -> torch.Tensor | None:
        """The sink logit of every head, if there is one."""
        found = [self.data[mod.name] for mod in self.scores if isinstance(mod, SinkLogits)]
        return found[0] if found else None

    def find_dead(self, scores: torch.Tensor, dead: torch.Tensor | None) -> torch.Tensor | None:
        """Rows without a live key: `dead` bool[rows] by the mask, or bool[..., rows] of the scores
        where a bias may take pairs away."""
        if not any(isinstance(mod, Bias) for mod in self.scores):
            return dead
        return (scores == -torch.inf).all(-1)

    def modify(self, scores: torch.Tensor, p: torch.Tensor, keys: torch.Tensor,
               first: tuple[int, int]) -> torch.Tensor:
        """Scores [B, Hkv, group, rows, keys] modified; `first` is the batch entry and head they
        start at."""
        if not self.scores:
            return scores
        b, kv_heads, group = scores.shape[:3]
        batch = torch.arange(first[0], first[0] + b, device=p.device).view(-1, 1, 1, 1, 1)
        head = torch.arange(first[1], first[1] + kv_heads * group, device=p.device)
        at = ScorePlace(batch, head.view(1, kv_heads, group, 1, 1), p[:, None], keys,
                        self.shape.q_offset, self.heads)
        return modify_scores(scores, self.scores, at, self.data)


def attend_kind(kind: Kind, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Run,
                batch: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads that share one mask; (batch, head) is the first of them."""
    b, heads, _, dim = q.shape
    shape = call.shape
    grouped = q.reshape(b, k.shape[1], heads // k.shape[1], shape.q_len, dim)
    site = Site.of(shape, batch, head, call.heads, call.bound)
    outs, lses = [], []
    for first, ranges in walk_tiles(kind.plan, site, shape, kind.opaque):
        last = min(first + BLOCK_M, shape.q_len)
        keys = sum(stop - start for start, stop, _ in ranges)
        step = max(1, min(BLOCK_M, SCORE_LIMIT // max(1, b * heads * keys)))
        for row in range(first, last, step):
            rows = slice(row, min(row + step, last))
            p = torch.arange(rows.start, rows.stop, device=q.device) + shape.q_offset
            one = attend_listed if kind.listed else attend_rows
            out, lse = one(kind.mask, grouped[:, :, :, rows], k, v, ranges, p, site, call)
            outs.append(out)
            lses.append(lse)
    if not outs:
        return q.new_zeros(b, heads, 0, v.shape[3]), q.new_zeros(b, heads, 0).float()
    out = torch.cat(outs, 3).reshape(b, heads, shape.q_len, v.shape[3])
    if not call.needs_lse:
        return out.to(q.dtype), out.new_empty(0)
    lse = torch.cat(lses, 3).reshape(b, heads, shape.q_len)
    if (sinks := call.sinks) is not None:
        out, lse = add_sinks(out, lse, sinks[head:head + heads, None])
    return out.to(q.dtype), lse


def walk_tiles(plan: Plan, site: Site, shape: Shape,
               opaque: bool) -> Iterator[tuple[int, list[Range]]]:
    """(first row, key ranges) of every query tile; neighbouring tiles of a kind are one range."""
    values = plan.run_bounds(shape, site.batch, site.head, site.bound)
    full, masked = (plan.segments(which, values) for which in (plan.full, plan.masked))
    tiles = np.arange(-(-shape.kv_len // plan.block_n))
    for i, row in enumerate(range(0, shape.q_len, plan.block_m)):
        kinds = np.zeros(len(tiles), dtype=np.int8)
        for start, stop in masked:
            kinds[start[i]:stop[i]] = 1
        if plan.sieve is not None and tiles.size:
            kinds *= plan.sift(row_of(values, i), tiles)[0]
        for start, stop in full:
            kinds[start[i]:stop[i]] = 1 if opaque else 2
        yield row, ranges_of(kinds, plan.block_n, shape.kv_len)


def row_of(values: dict[str, Any], i: int) -> dict[str, Any]:
    """The bounds' variables for query tile i alone: those with one number a query tile."""
    rows = len(values["p_first"])
    return {name: value[i:i + 1] if np.shape(value) == (rows,) and not name.startswith("slot_")
            else value for name, value in values.items()}


def ranges_of(kinds: npt.NDArray[np.int8], block_n: int, kv_len: int) -> list[Range]:
    """Runs of equal tiles as key ranges, dead ones left out: 0 1 1 2  -->  [b, 3b) and [3b, 4b)."""
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return [(a * block_n, min(b * block_n, kv_len), kinds[a] == 1)
            for a, b in pairwise(borders) if a < b and kinds[a]]


def attend_rows(mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                ranges: list[Range], p: torch.Tensor, site: Site,
                call: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Some query rows against their key ranges: one softmax over all of them.

    q [B, Hkv, group, rows, D], k and v [B, Hkv, L, D or Dv], p int64[rows] absolute positions.
    The heads of a group are folded into rows: for two heads a tile then took 1.5 ms instead of
    4.0 ms with a broadcast matrix product (2-core x86, torch 2.13).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    b, kv_heads, group, rows, dim = q.shape
    if not ranges:
        lse = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), lse
    folded = q.reshape(b, kv_heads, group * rows, dim).to(wide) * call.scale
    scores = folded @ take_ranges(k, ranges).to(wide).transpose(-1, -2)
    scores = scores.view(b, kv_heads, group, rows, -1)
    scores = call.modify(scores, p, keys_of(ranges, p), (site.batch, site.head))
    dead = call.find_dead(scores, mask_scores(mask, scores, ranges, p, site))
    lse = torch.logsumexp(scores, -1) if call.needs_lse else scores.new_empty(0)
    if dead is not None:
        # any finite row: softmax must not see NaN
        scores = scores.masked_fill(dead[..., None], 0.0)
    weights = torch.softmax(scores, -1).view(b, kv_heads, group * rows, -1)
    out = (weights @ take_ranges(v, ranges).to(wide)).view(b, kv_heads, group, rows, -1)
    return out if dead is None else out.masked_fill(dead[..., None], 0.0), lse


def attend_listed(mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                  ranges: list[Range], p: torch.Tensor, site: Site,
                  call: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_rows`, of one head, after picking the keys some row of the tile sees."""
    keys = keys_of(ranges, p)
    live = torch.as_tensor(mask.contains(p[:, None], keys[None, :], site), device=p.device)
    live = live.reshape(-1, *live.shape[-2:])[0] if live.dim() > 2 else live
    live = live.broadcast_to(len(p), len(keys))
    seen = live.any(0)
    keys, live = keys[seen], live[:, seen]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * call.scale) @ k[:, :, keys].to(wide).transpose(-1, -2)[:, :, None]
    scores = call.modify(scores, p, keys, (site.batch, site.head)).masked_fill(~live, -torch.inf)
    dead = call.find_dead(scores, ~live.any(-1))
    assert dead is not None
    lse = torch.logsumexp(scores, -1) if call.needs_lse and len(keys) else torch.full(
        scores.shape[:-1], -torch.inf, dtype=wide, device=q.device)
    weights = torch.softmax(scores.masked_fill(dead[..., None], 0.0), -1)
    out = weights @ v[:, :, keys].to(wide)[:, :, None]
    return out.masked_fill(dead[..., None], 0.0), lse


def keys_of(ranges: list[Range], like: torch.Tensor) -> torch.Tensor:
    """The keys that the ranges name, int64[keys]."""
    parts = [torch.arange(start, stop, device=like.device) for start, stop, _ in ranges]
    return torch.cat(parts) if parts else like.new_empty(0)


def take_ranges(t: torch.Tensor, ranges: list[Range]) -> torch.Tensor:
    """The rows of k or v that the ranges name, [B, Hkv, keys, D]; of one range a view."""
    parts = [t[:, :, start:stop] for start, stop, _ in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def mask_scores(mask: Mask, scores: torch.Tensor, ranges: list[Range], p: torch.Tensor,
                site: Site) -> torch.Tensor | None:
    """Set dead pairs of the MASKED ranges to -inf, in place; the dead rows (bool[rows]), if any."""
    column, alive = 0, None
    for start, stop, masked in ranges:
        part = scores[..., column:column + stop - start]
        column += stop - start
        if masked:
            keys = torch.arange(start, stop, device=p.device)
            live = torch.as_tensor(mask.contains(p[:, None], keys[None, :], site), device=p.device)
            live = live.broadcast_to(len(p), stop - start)
            part.masked_fill_(~live, -torch.inf)
            alive = live.any(-1) if alive is None else alive | live.any(-1)
    if alive is None or not all(masked for _, _, masked in ranges) or bool(alive.all()):
        return None
    return ~alive
