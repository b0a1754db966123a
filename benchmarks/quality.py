"""What do policies cost a real model in perplexity? Gemma 3 270M on texts that Python ships.

The loss of the second half of each text: there keys are missing. A row's mask is that of a prompt's
row, so the last 128 rows of a triangle are dense.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import Report
from benchmarks.texts import POLICIES, text_ids
from examples.gemma import load
from maskdsl.integrations.transformers import apply


def run(report: Report) -> None:
    """Perplexity by policy, kind of text and length."""
    model, tokenizer = load()
    gpu = torch.cuda.is_available()
    lengths, count = ((2048, 4096, 8192, 16384), 6) if gpu else ((2048,), 1)
    for length in lengths:
        for kind in ("python", "english"):
            texts = [text_ids(tokenizer, kind, n, length) for n in range(count)]
            for name, policy in POLICIES.items():
                apply(model, policy)
                losses = torch.cat([second_half_loss(model, ids) for ids in texts])
                report.add(length=length, text=kind, policy=name, tokens=losses.numel(),
                           loss=losses.mean().item(), perplexity=losses.mean().exp().item())


@torch.no_grad()
def second_half_loss(model: Any, ids: torch.Tensor, step: int = 256) -> torch.Tensor:
    """Negative log-likelihood of every token of the second half, float32[tokens]; the vocabulary is
    large, so logits are made `step` rows at a time."""
    ids = ids.to(model.device)
    hidden = model.model(ids, use_cache=False).last_hidden_state[0]
    parts = []
    for first in range(ids.shape[1] // 2 - 1, ids.shape[1] - 1, step):
        rows = slice(first, min(first + step, ids.shape[1] - 1))
        logits = model.lm_head(hidden[rows]).float()
        parts.append(torch.nn.functional.cross_entropy(
            logits, ids[0, first + 1:rows.stop + 1], reduction="none").cpu())
    return torch.cat(parts)
