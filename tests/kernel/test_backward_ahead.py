"""The gradients' kernels compiled for chips that are not here: no spills, shared memory that fits,
tensor cores in use, and no mask in the loops over FULL tiles."""

from __future__ import annotations

import re

import pytest
from test_ahead import run_program

from maskdsl import Causal, LastQ, Sink, Softcap, VerticalSlash, Window, simplify
from maskdsl.codegen.backward import TritonBackward
from maskdsl.codegen.kernel import interpreting
from maskdsl.codegen.tune import Config

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")

PROGRAM = """
import json, sys, torch
from ahead import SHARED_LIMIT, compile_backward
from maskdsl import *
triangle = Sink(8) | Window(512) | LastQ(128)
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
chip, which, rows = sys.argv[1], sys.argv[2], []
static = [
    (triangle, (), bf16, 128, 128), (triangle, (), bf16, 64, 64), (Full(), (), fp16, 80, 80),
    (triangle, (), bf16, 256, 256), (triangle, (), bf16, 192, 128), (triangle, (), fp32, 64, 64),
    (Chunk(8192) | Stride(300), (), bf16, 128, 128),
    (RandomBlocks(64, 3) | Window(192), (), bf16, 64, 64),
]
listed = [
    (triangle | VerticalSlash("vs"), (), bf16, 128, 128),
    (Blocks("b", 128, 128), (), bf16, 128, 128), (Blocks("b", 64, 64) | triangle, (), bf16, 64, 64),
    (Columns("c") | Window(128), (), bf16, 128, 128), (Document("doc"), (), bf16, 128, 128),
    (PerHead([Window(64), Causal(), triangle, Window(64)]), (), bf16, 128, 128),
    (triangle, (Softcap(30.0), Bias("bias")), bf16, 128, 128),
    (triangle, (SinkLogits("sinks"),), bf16, 64, 64),
    (triangle, (RelativePosition("table", 128),), bf16, 128, 128),
    (TokenTopK("t"), (), bf16, 128, 128),
    (PerHead([Window(64), VerticalSlash("vs"), triangle, Window(64)]), (), bf16, 128, 128),
    (triangle, (RelativePosition("table", 128),), bf16, 64, 64),
]
cases = {"static": static, "listed": listed}[which]
for mask, scores, dtype, dim, value_dim in cases:
    for name, c in compile_backward(chip, mask, dtype, dim, value_dim, scores=scores).items():
        rows.append({"what": f"{name} {mask!r} {scores!r} {dtype} {dim}/{value_dim}",
                     "shared": c.shared, "spills": c.spills, "in_loops": c.in_loops,
                     "limit": SHARED_LIMIT[chip],
                     "by_key": name in ("key_gradients", "column_gradients", "table_gradients0"),
                     "fits": dtype != fp32 and dim <= 128 and name in (
                         "query_gradients", "key_gradients", "column_gradients"),
                     "wgmma": "wgmma.mma_async" in c.text})
print(json.dumps(rows))
"""


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("which", [pytest.param("static", marks=pytest.mark.slow),
                                   pytest.param("listed", marks=pytest.mark.exhaustive)])
def test_backward_kernels_compile_well(chip: str, which: str) -> None:
    for row in run_program(PROGRAM, chip, which):
        # What is kept from one head to the next leaves registers to the loops of the walk by key.
        around = 500 if chip == "sm_90" and row["by_key"] else 0
        assert row["spills"] <= around, row
        assert row["in_loops"] <= 30, row
        assert row["shared"] <= row["limit"], row
        if chip == "sm_90" and row["fits"]:
            assert row["wgmma"], row


def test_full_tiles_carry_no_mask() -> None:
    """Of every loop over FULL tiles in the gradients' kernels, static or listed."""
    for mask, scores in ((Sink(4) | Window(500) | LastQ(64), ()),
                         (Window(500) | VerticalSlash("vs"), ()), (Window(500), (Softcap(9.0),))):
        made = TritonBackward(simplify(Causal() & mask), None, scores)
        config = Config(32, 32, 4, 1)
        text = made.source(config, config)
        loops = re.split(r"\n +# (?=FULL tiles|MASKED tiles|COLUMNS)", text)[1:]
        full = [loop for loop in loops if loop.startswith("FULL")]
        assert len(full) >= 2
        for loop in full:
            depth = len(re.search(r"\n( +)for ", loop)[1])
            body = re.split(rf"\n {{0,{depth}}}\S", loop.split("num_stages=STAGES):")[1])[0]
            assert "tl.dot" in body and "live" not in body, body
        masked = [loop for loop in loops if not loop.startswith("FULL")]
        assert all("live" in loop for loop in masked)
