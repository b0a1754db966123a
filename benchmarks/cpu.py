"""On a CPU: block-sparse torch ops beside dense attention, triangle mask, float32."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import Report

PROGRAM = """
import sys, time, resource, torch, maskdsl
from maskdsl import LastQ, Shape, Sink, Window
length, way = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
q, k, v = (torch.randn(1, 4, length, 64) for _ in range(3))
mask = Sink(8) | Window(512) | LastQ(128)
if way == "maskdsl":
    attn = maskdsl.compile(mask, backend="torch")
    call = lambda: attn(q, k, v)
else:
    def call():
        live = maskdsl.dense(maskdsl.Causal() & mask, Shape(length, length))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=live)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for _ in range(3):
    start = time.perf_counter()
    out = call()
    times.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sorted(times)[1], (peak - base) / 1024, out.double().abs().sum().item())
"""


def run(report: Report) -> None:
    """8K to 32K tokens, 4 heads of 64; each way in a process of its own, for its peak memory."""
    for length in (8192, 16384, 32768):
        sums = {}
        for way in ("maskdsl", "dense SDPA"):
            done = subprocess.run([sys.executable, "-c", PROGRAM, str(length), way], text=True,
                                  capture_output=True, check=True)
            seconds, extra, total = map(float, done.stdout.split())
            sums[way] = total
            report.add(kernel=way, length=length, seconds=seconds, extra_mib=extra)
        assert abs(sums["maskdsl"] / sums["dense SDPA"] - 1) < 1e-4, sums
