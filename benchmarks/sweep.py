"""Which tile sizes, warps and stages are fastest? Feeds codegen/tune.py."""

from __future__ import annotations

from benchmarks.measure import MASKS, Report, make_inputs, mask_of, tera_flops, time_ms
from maskdsl import Causal, Full
from maskdsl.codegen.kernel import TritonForward
from maskdsl.codegen.tune import Config
from maskdsl.shape import Shape
from maskdsl.simplify import simplify

CONFIGS = [Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 4, 4), Config(64, 128, 4, 2),
           Config(64, 128, 4, 3), Config(128, 64, 4, 3), Config(128, 64, 8, 2),
           Config(128, 64, 8, 3), Config(128, 64, 8, 4), Config(128, 128, 8, 2),
           Config(128, 32, 4, 4)]


def run(report: Report) -> None:
    """Every config on every mask, forward, D = 128 and 64."""
    for dim in (128, 64):
        for name, length in [*((n, 32768) for n in MASKS), ("dense causal", 16384)]:
            mask = mask_of(MASKS[name]) if name in MASKS else Full()
            q, k, v = make_inputs(length, dim=dim)
            for config in CONFIGS:
                kernel = TritonForward(simplify(Causal() & mask), config)
                try:
                    call = kernel.prepare(q, k, v, Shape(length, length), dim**-0.5, "bhld", False)
                    ms = time_ms(call, q, k, v, repeat_ms=60)
                except Exception as error:  # a config that does not fit is a result too
                    print(name, dim, config, type(error).__name__)
                    continue
                report.add(mask=name, length=length, dim=dim, tile=f"{config.block_m}x"
                           f"{config.block_n}", warps=config.warps, stages=config.stages, ms=ms,
                           tflops=tera_flops(mask, length, ms, dim=dim))
