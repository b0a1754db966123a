"""How long from the import to the first result with every cache empty?"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from benchmarks.measure import Report

OURS = """
import time, torch
q, k, v = (torch.randn(1, h, 32768, 128, device="cuda", dtype=torch.bfloat16) for h in (32, 8, 8))
torch.cuda.synchronize()
start = time.perf_counter()
import maskdsl
from maskdsl import LastQ, Sink, Window
attn = maskdsl.compile(Sink(8) | Window(512) | LastQ(128))
attn(q, k, v)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
FLEX = """
import time, torch
q, k, v = (torch.randn(1, h, 32768, 128, device="cuda", dtype=torch.bfloat16) for h in (32, 8, 8))
torch.cuda.synchronize()
start = time.perf_counter()
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
mask = lambda b, h, q, k: (q >= k) & ((k < 8) | (q - k < 512) | (q >= 32768 - 128))
blocks = create_block_mask(mask, None, None, 32768, 32768, device="cuda")
torch.compile(flex_attention)(q, k, v, block_mask=blocks, enable_gqa=True)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def run(report: Report) -> None:
    """Fresh processes with fresh cache folders; then again with the caches filled."""
    for kernel, program in (("maskdsl", OURS), ("FlexAttention", FLEX)):
        with tempfile.TemporaryDirectory() as folder:
            places = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "MASKDSL_CACHE_DIR")
            environment = os.environ | {name: f"{folder}/{name}" for name in places}
            for caches in ("empty", "filled"):
                run = subprocess.run([sys.executable, "-c", program], env=environment, text=True,
                                     capture_output=True, check=True)
                report.add(kernel=kernel, caches=caches,
                           seconds=float(run.stdout.strip().splitlines()[-1]))
