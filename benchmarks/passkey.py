"""Does a real model still find a number in a long prompt? Gemma 3 270M, by depth and policy."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure import Report
from benchmarks.texts import POLICIES, passkey_ids
from examples.gemma import load
from maskdsl.integrations.transformers import apply

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def run(report: Report) -> None:
    """Share of keys told right, and of their digits, out of several at each depth."""
    model, tokenizer = load()
    gpu = torch.cuda.is_available()
    lengths, trials = ((2048, 4096, 8192, 16384), 20) if gpu else ((1536,), 3)
    for length in lengths:
        for name, policy in POLICIES.items():
            apply(model, policy)
            row: dict[str, Any] = {"length": length, "policy": name, "trials": trials}
            right = digits = 0
            for depth in DEPTHS:
                found = [ask(model, tokenizer, length, depth, seed) for seed in range(trials)]
                row[f"depth {depth}"] = sum(all(f) for f in found) / trials
                right += sum(all(f) for f in found)
                digits += sum(map(sum, found))
            total = trials * len(DEPTHS)
            report.add(**row, all_depths=right / total, digits=digits / (5 * total))


@torch.no_grad()
def ask(model: Any, tokenizer: Any, length: int, depth: float, seed: int) -> list[bool]:
    """Which of the key's five digits the greedy answer has in their place."""
    ids, key = passkey_ids(tokenizer, length, depth, seed)
    out = model.generate(ids.to(model.device), max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(out[0, ids.shape[1]:]).strip()
    return [i < len(answer) and answer[i] == digit for i, digit in enumerate(key)]
