"""Dense attention with modified scores, random modifiers, and data for them."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_strategies import HEADS
from hypothesis import strategies as st

from maskdsl import ALiBi, Bias, RelativePosition, Shape, SinkLogits, Softcap
from maskdsl.scores import ScoreMod, ScorePlace, add_sinks, modify_scores

MODS: list[ScoreMod] = [Softcap(2.0), ALiBi(), ALiBi([0.5, -0.25, 0.0, 2.0]), Bias("bias"),
                        RelativePosition("table", 5), SinkLogits("sinks")]


def modified_scores(q: torch.Tensor, k: torch.Tensor, live: torch.Tensor,
                    mods: tuple[ScoreMod, ...], data: dict[str, Any], shape: Shape,
                    scale: float | None = None) -> torch.Tensor:
    """Modified scores [B, Hq, Lq, Lk] in the dtype of q, -inf where a pair is dead."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)

    def numbers(n: int) -> torch.Tensor:
        return torch.arange(n, device=q.device)

    at = ScorePlace(numbers(q.shape[0]).view(-1, 1, 1, 1), numbers(q.shape[1]).view(1, -1, 1, 1),
                    (numbers(shape.q_len) + shape.q_offset).view(1, 1, -1, 1),
                    numbers(shape.kv_len).view(1, 1, 1, -1), shape.q_offset, q.shape[1])
    return modify_scores(scores, mods, at, data).masked_fill(~live, -torch.inf)


def modified_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, live: torch.Tensor,
                       mods: tuple[ScoreMod, ...], data: dict[str, Any], shape: Shape,
                       scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention with modified scores, in the dtype of q."""
    scores = modified_scores(q, k, live, mods, data, shape, scale)
    dead = (scores == -torch.inf).all(-1)
    scores = scores.masked_fill(dead[..., None], 0.0)  # any finite row: no NaN in its gradient
    lse = torch.logsumexp(scores, -1).masked_fill(dead, -torch.inf)
    out = torch.softmax(scores, -1).masked_fill(dead[..., None], 0.0) @ \
        v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    for mod in mods:
        if isinstance(mod, SinkLogits):
            out, lse = add_sinks(out, lse, data[mod.name][:, None])
    return out, lse


def make_data(mods: tuple[ScoreMod, ...], shape: Shape, seed: int, lead: tuple[int, int],
              dtype: torch.dtype = torch.float32, heads: int = HEADS) -> dict[str, torch.Tensor]:
    """Random tensors for all modifiers that take one; a bias takes some pairs away."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    made: dict[str, torch.Tensor] = {}
    for mod in mods:
        if isinstance(mod, Bias):
            bias = draw(*lead, shape.q_len, shape.kv_len)
            made[mod.name] = bias.masked_fill(bias > 1.5, -torch.inf)
        elif isinstance(mod, RelativePosition):
            made[mod.name] = draw(lead[1], 2 * mod.reach + 1)
        elif isinstance(mod, SinkLogits):
            made[mod.name] = draw(heads)
    return made


def some_mods() -> st.SearchStrategy[tuple[ScoreMod, ...]]:
    """Up to four modifiers in any order; each name once."""
    return st.lists(st.sampled_from(MODS), min_size=1, max_size=4,
                    unique_by=lambda mod: mod.name or repr(mod)).map(tuple)
