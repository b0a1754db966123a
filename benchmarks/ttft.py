"""How long until the first token? Gemma 3 270M at 4K, 16K and 32K: ours, sdpa, flex_attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import Report
from benchmarks.texts import POLICIES, text_ids
from examples.gemma import load
from maskdsl.integrations.transformers import apply

OURS = ("dense", "triangle in every layer", "TriangleMix, dense 5 and 11")


def run(report: Report) -> None:
    """Median seconds of a prompt's forward with a cache, to its last logits."""
    gpu = torch.cuda.is_available()
    lengths = (4096, 16384, 32768) if gpu else (512,)
    rows: list[tuple[str, str]] = [(name, "maskdsl") for name in OURS]
    rows += [("stock", "sdpa"), ("stock", "flex_attention")]
    for policy, kernel in rows:
        model, tokenizer = load("sdpa" if kernel == "maskdsl" else kernel)
        if kernel == "maskdsl":
            apply(model, POLICIES[policy])
        whole = text_ids(tokenizer, "english", 0, max(lengths)).to(model.device)
        for length in lengths:
            seconds, first = first_token(model, whole[:, :length])
            report.add(length=length, kernel=kernel, policy=policy, seconds=seconds,
                       first_call_seconds=first)


@torch.no_grad()
def first_token(model: Any, ids: torch.Tensor, repeats: int = 7) -> tuple[float, float]:
    """(median of warm calls, the very first call), seconds."""
    call: Callable[[], Any] = lambda: model(  # noqa: E731
        ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2], times[0]
