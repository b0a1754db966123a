"""The one-pass Hopper backward, compiled ahead of time: what its loops are made of."""

from __future__ import annotations

import pytest
from test_ahead import one_run, run_program

ONE_PASS = """
import json, torch
from ahead import SHARED_LIMIT, compile_one_pass
from maskdsl import Causal, Full, Window
rows = []
for mask, dtype in [(Causal(), torch.bfloat16), (Full(), torch.float16),
                    (Causal() & Window(9000), torch.bfloat16)]:
    c, loops = compile_one_pass(mask, dtype)
    rows.append({"what": f"{mask!r} {dtype}", "shared": c.shared, "spills": c.spills,
                 "limit": SHARED_LIMIT["sm_90"], "loops": loops})
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_a_step_overlaps_products_and_exponentials() -> None:
    """S and R in flight, a wait for S, 32 exponentials under R, a wait for R, then the products
    that add up; a wait for dQ, which is added to memory in pieces of four numbers under the others,
    and a wait for those. Nothing in that loop spills, and what it reads of shared memory is read
    beside the sums. No product may be serialised: count_spills fails on ptxas' warning. (The
    loading warps, with 24 registers, and the computing ones once an item spill some words.)"""
    for row in run_program(ONE_PASS):
        assert row["spills"] <= 336 and row["shared"] <= row["limit"], (row["what"], row["spills"])
        steps = [loop for loop in row["loops"] if one_run(loop) == "QWeWQWW"]
        assert len(steps) == 2, (row["what"], [one_run(loop) for loop in row["loops"]])
        for loop in steps:
            assert len(loop) < 560, (row["what"], len(loop))
            assert sum(op.startswith("MUFU.EX2") for op in loop) == 32, row["what"]
            assert not any(op.startswith(("LDL", "STL")) for op in loop), row["what"]
            waits = [i for i, op in enumerate(loop) if op.startswith("WARPGROUP.DEPBAR")]
            added = [i for i, op in enumerate(loop) if op.startswith("REDG.E.ADD.F32x4")]
            assert len(added) == 8 and waits[2] < added[0] and added[-1] < waits[3], row["what"]
            reads = [i for i, op in enumerate(loop) if op.startswith("LDS")]
            assert len(reads) >= 17 and waits[1] < reads[0] < reads[-1] < waits[3], row["what"]
