"""Which tiles, warps and stages of the portable gradients' kernels are fastest? Does TMA help?

Feeds `pick_backward` in codegen/tune.py. One walk at a time: dQ, or dK and dV; delta's kernel is in
both. 32K triangles and dense causal attention.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

import maskdsl
from benchmarks.backward import gradient_flops
from benchmarks.cases import TRIANGLES, Pattern
from benchmarks.measure import Report, make_inputs, time_ms
from maskdsl.codegen import backward_run
from maskdsl.codegen.backward import TritonBackward
from maskdsl.codegen.tune import Config

LENGTH = 32768
PATTERNS = (TRIANGLES[1], TRIANGLES[0], Pattern())
QUERY_CONFIGS = [Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(128, 64, 8, 2),
                 Config(128, 64, 8, 3), Config(128, 128, 8, 2)]
KEY_CONFIGS = [Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 8, 2),
               Config(64, 128, 8, 2), Config(64, 128, 8, 3), Config(32, 64, 8, 1)]


def time_walk(pattern: Pattern, tensors: tuple[torch.Tensor, ...], by_key: bool, config: Config,
              copied: bool) -> float:
    """Milliseconds of dQ alone, or of dK and dV."""
    leaves = [t.detach().requires_grad_((i > 0) == by_key) for i, t in enumerate(tensors)]
    wanted = [t for t in leaves if t.requires_grad]
    real: Any = backward_run.fits_tma

    def fits(t: torch.Tensor, strides: tuple[int, int, int]) -> bool:
        return copied and real(t, strides)

    with mock.patch.object(TritonBackward, "configs", return_value=(config, config)), \
            mock.patch.object(backward_run, "fits_tma", fits):
        out = maskdsl.compile(pattern.mask, backend="triton")(*leaves)
        grad = torch.ones_like(out)
        return time_ms(torch.autograd.grad, out, wanted, grad, retain_graph=True, repeat_ms=60)


def run(report: Report) -> None:
    """Every config on every mask, by query and by key."""
    for pattern in PATTERNS:
        tensors = make_inputs(LENGTH)
        for by_key, configs in ((True, KEY_CONFIGS), (False, QUERY_CONFIGS)):
            share = 4 / 7 if by_key else 3 / 7  # of the products of both walks
            for config in configs:
                for copied in (True, False) if config is configs[0] else (True,):
                    if report.is_late(f"{config} on {pattern.key}"):
                        continue
                    row: dict[str, Any] = {
                        "mask": pattern.key, "walk": "by key" if by_key else "by query",
                        "tile": f"{config.block_m}x{config.block_n}", "warps": config.warps,
                        "stages": config.stages, "tma": copied}
                    try:
                        ms = time_walk(pattern, tensors, by_key, config, copied)
                    except Exception as error:  # a config that does not fit is a result too
                        report.add(**row, failed=f"{type(error).__name__}: {error}"[:120])
                        continue
                    products = share * 7 / 5 * gradient_flops(pattern, LENGTH)
                    report.add(**row, ms=ms, product_tflops=products / ms / 1e9)
