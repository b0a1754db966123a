"""How long until the first token? Gemma 3 270M's architecture: ours, sdpa, flex_attention.

Weights are random: time does not depend on their values, and so nothing but `transformers` must be
there. Without a GPU a rehearsal of all rows with a tiny model, whose numbers say nothing.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.measure import Report, device
from benchmarks.texts import POLICIES
from maskdsl.integrations.transformers import apply

OURS = ("dense", "triangle in every layer", "TriangleMix, dense 5 and 11")
LAYERS = 18  # of Gemma 3 270M, as the sizes below
REAL = {"vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "head_dim": 256,
        "sliding_window": 512, "query_pre_attn_scalar": 256}
TINY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32,
        "sliding_window": 48, "query_pre_attn_scalar": 32}


def make_model(implementation: str) -> Any:
    """A decoder of that architecture, bfloat16 on a GPU; in a rehearsal a tiny one."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **(REAL if device() == "cuda" else TINY), num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=1, pad_token_id=0, max_position_embeddings=32768,
        layer_types=["full_attention" if layer % 6 == 5 else "sliding_attention"
                     for layer in range(LAYERS)])
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    with torch.device(device()):  # random numbers for 170 million weights take a CPU long
        model = AutoModelForCausalLM.from_config(config, dtype=dtype,
                                                 attn_implementation=implementation)
    return model.eval().requires_grad_(False)


def run(report: Report) -> None:
    """Median seconds of a prompt's forward with a cache, to its last logits."""
    report.about["weights"] = "random, in the architecture of Gemma 3 270M"
    lengths, repeats = ((4096, 16384, 32768), 7) if device() == "cuda" else ((200, 300), 1)
    rows: list[tuple[str, str]] = [(name, "maskdsl") for name in OURS]
    rows += [("stock", "sdpa"), ("stock", "flex_attention")]
    ids = torch.randint(1, 1000, (1, max(lengths)), device=device(),
                        generator=torch.Generator(device()).manual_seed(0))
    for policy, kernel in rows:
        if report.is_late(f"{policy}, {kernel}"):
            continue
        model = make_model("sdpa" if kernel == "maskdsl" else kernel)
        if kernel == "maskdsl":
            apply(model, POLICIES[policy])
        for length in lengths:
            try:
                seconds, first = first_token(model, ids[:, :length], repeats)
            except (RuntimeError, ValueError) as error:  # a row, not the run
                report.add(length=length, kernel=kernel, policy=policy,
                           failed=f"{type(error).__name__}: {str(error)[:200]}")
                continue
            report.add(length=length, kernel=kernel, policy=policy, seconds=seconds,
                       first_call_seconds=first)


@torch.no_grad()
def first_token(model: Any, ids: torch.Tensor, repeats: int) -> tuple[float, float]:
    """(median of warm calls, the very first call), seconds."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2], times[0]
