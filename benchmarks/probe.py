"""Which layers need their middle? The gradient probe on Gemma 3 270M, with a plot.

The logit of a passkey's first digit, by the gradient of an all-ones factor on every layer's
attention; sections of 64, 128 and 128 tokens as in the paper.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.measure import Report
from benchmarks.texts import passkey_ids
from examples.gemma import load
from maskdsl.integrations.probe import probe_layers


def run(report: Report) -> None:
    """One row a layer."""
    model, tokenizer = load()
    count, length = (100, 2000) if torch.cuda.is_available() else (8, 1024)
    samples = []
    for seed in range(count):
        ids, key = passkey_ids(tokenizer, length, (seed % 5) / 4, seed)
        digit = tokenizer(key[0], add_special_tokens=False).input_ids[-1]
        samples.append((ids.to(model.device), digit))
    result = probe_layers(model, samples)
    dense = result.dense_layers()
    for layer, middle in enumerate(result.gradient["middle"]):
        report.add(layer=layer, window=512 if layer in result.windowed else "none",
                   middle_gradient=middle, last_gradient=result.gradient["last"][layer],
                   streaming_gradient=result.gradient["streaming"][layer],
                   middle_score=result.score["middle"][layer],
                   last_score=result.score["last"][layer],
                   keep_dense="yes" if layer in dense else "")
    print("samples:", result.samples, "tokens:", result.tokens[0], "keep dense:", dense)
    result.plot(Path("docs/benchmarks/probe.png"))
