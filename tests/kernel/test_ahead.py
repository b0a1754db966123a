"""Emitted kernels compiled for chips that are not here: spills, shared memory, instructions.

In processes of their own: under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ahead import COPIES_TILES, SHARED_LIMIT

PROGRAM = """
import json, sys, torch
from ahead import SHARED_LIMIT, compile_for
from maskdsl import Chunk, Full, LastQ, RandomBlocks, Sink, Stride, Window
triangle = Sink(8) | Window(512) | LastQ(128)
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
chip, rows = sys.argv[1], []
for mask, dtype, dim, value_dim in [
    (triangle, bf16, 128, 128), (triangle, bf16, 64, 64), (triangle, fp16, 80, 80),
    (triangle, bf16, 256, 256), (triangle, bf16, 192, 128), (triangle, fp32, 128, 128),
    (Full(), bf16, 128, 128), (Full(), fp16, 64, 64), (Full(), fp32, 64, 64),
    (Sink(4) | Window(2048) | LastQ(64), bf16, 128, 128),
    (Chunk(8192) | Stride(300), bf16, 128, 128), (RandomBlocks(64, 3) | Window(192), bf16, 64, 64),
]:
    c = compile_for(chip, mask, dtype, dim, value_dim)
    rows.append({"what": f"{mask!r} {dtype} {dim}/{value_dim}", "shared": c.shared,
                 "spills": c.spills, "limit": SHARED_LIMIT[chip], "half": dtype != fp32,
                 "wgmma": "wgmma.mma_async" in c.text, "tma": "cp.async.bulk.tensor" in c.text,
                 "async": "cp.async" in c.text})
print(json.dumps(rows))
"""

SLOTS = """
import json, sys, torch
from ahead import SHARED_LIMIT, compile_for, compile_lister
from maskdsl import (Blocks, Columns, Document, Empty, Full, LastQ, PerHead, Sink, TokenTopK,
                     VerticalSlash, Window)
from maskdsl.codegen.tune import Config
triangle = Sink(8) | Window(512) | LastQ(128)
chip, rows = sys.argv[1], []
for mask in [VerticalSlash("vs"), triangle | VerticalSlash("vs"),
             Blocks("b", 128, 128) | Sink(4) | Window(128), TokenTopK("t"),
             Columns("c") | Window(512), Document("d") & Window(1024),
             PerHead([Full(), triangle, VerticalSlash("vs"), Empty(), Sink(9)])]:
    c = compile_for(chip, mask, torch.bfloat16, 128)
    rows.append({"what": repr(mask), "shared": c.shared, "spills": c.spills,
                 "limit": SHARED_LIMIT[chip], "wgmma": "wgmma.mma_async" in c.text})
c = compile_lister(chip, Blocks("b", 64, 64) | TokenTopK("t"), Config(64, 64, 4, 3))
rows.append({"what": "lister", "shared": c.shared, "spills": c.spills,
             "limit": SHARED_LIMIT[chip], "wgmma": True})
print(json.dumps(rows))
"""

# Four stages of 64 x 32 with lists do not compile for AMD (Triton 3.6 fails in its pipeliner).
CONFIGS = """
import json, sys, torch
import ahead
from maskdsl import Blocks, LastQ, Sink, VerticalSlash, Window
from maskdsl.codegen.autotune import portable_candidates
from maskdsl.codegen.tune import Config, pick_config, shared_bytes
ahead.count_spills = lambda *args: 0  # a candidate may spill: it loses by its time
triangle, lists = Sink(8) | Window(512) | LastQ(128), VerticalSlash("vs") | Blocks("b", 128, 128)
bf16, fp32, chip, rows = torch.bfloat16, torch.float32, sys.argv[1], []
for mask, dtype, dim, value_dim, every, more in [  # every candidate, or the default
    (triangle, bf16, 128, 128, True, [(128, 128, 8, 3), (256, 64, 8, 2), (16, 16, 4, 8),
                                      (64, 256, 8, 1)]),
    (triangle, bf16, 64, 64, False, [(64, 128, 4, 2), (128, 128, 8, 4)]),
    (triangle, bf16, 192, 128, False, []), (triangle, bf16, 256, 256, True, [(64, 64, 4, 3)]),
    (triangle, fp32, 64, 64, True, [(32, 32, 4, 2)]), (triangle, fp32, 192, 192, False, []),
    (lists, bf16, 128, 128, False, [(64, 64, 4, 5), (128, 64, 8, 2)]),
    (lists, bf16, 64, 64, False, [(16, 16, 4, 8), (64, 32, 4, 3)]),
]:
    size = dtype.itemsize
    default = pick_config(chip, dim, value_dim, size, 0.0)
    tried = portable_candidates(chip, dim, value_dim, size, default)
    for config in (*(tried if every else [default]), *(Config(*sizes) for sizes in more)):
        for tma in (True, False) if chip in ahead.COPIES_TILES and config == default else (True,):
            c = ahead.compile_for(chip, mask, dtype, dim, value_dim, config=config, tma=tma)
            rows.append({"what": f"{mask!r} {dtype} {dim}/{value_dim} {config} {tma}",
                         "shared": c.shared, "fits": config in tried,
                         "bound": shared_bytes(config, chip, dim, value_dim, size)})
print(json.dumps(rows))
"""

HOPPER = """
import json, sys, torch
from ahead import SHARED_LIMIT, compile_hopper
from maskdsl import Full, LastQ, PerHead, Sink, Where, Window
from maskdsl.codegen.hopper_cut import pick_room
triangle = Sink(8) | Window(512) | LastQ(128)
bf16, fp16, rows = torch.bfloat16, torch.float16, []
for mask, dtype, dim, value_dim, group in [
    (triangle, bf16, 128, 128, 4), (Full(), fp16, 128, 128, 1), (triangle, bf16, 64, 64, 6),
    (Full(), bf16, 64, 64, 4),
    (Where(lambda b, h, q, k: q - k < 40 * (h + 1)), bf16, 96, 64, 4),
    (triangle, fp16, 96, 96, 2), (triangle, bf16, 192, 128, 4), (triangle, bf16, 256, 256, 4),
    (Full(), fp16, 256, 256, 1), (PerHead([Full()] * 4 + [triangle] * 4), bf16, 128, 128, 4),
]:
    c, loops = compile_hopper(mask, dtype, dim, value_dim, group)
    three = mask == Full() and dim == 64
    rows.append({"what": f"{mask!r} {dtype} {dim}/{value_dim} {group}", "shared": c.shared,
                 "order": "QWeWE" if three else "[eE]*QWEW[eE]*",
                 "spills": c.spills, "limit": SHARED_LIMIT["sm_90"], "loops": loops,
                 "keys": pick_room(dim, value_dim)[1],
                 "most": 128 if dim < 256 else 448})
print(json.dumps(rows))
"""

HOPPER_BACKWARD = """
import json, sys, torch
from ahead import SHARED_LIMIT, compile_hopper_backward
from maskdsl import Chunk, Full, LastQ, Sink, Window
triangle = Sink(8) | Window(512) | LastQ(128)
bf16, fp16, rows = torch.bfloat16, torch.float16, []
for mask, dtype, dim, share in [
    (triangle, bf16, 128, 4), (Full(), fp16, 128, 1), (triangle, bf16, 64, 6),
    (Chunk(200) | Window(70), bf16, 128, 2),
]:
    for by_key in (True, False):
        c, loops = compile_hopper_backward(mask, dtype, dim, share, by_key)
        rows.append({"what": f"{mask!r} {dtype} {dim} {share} {by_key}", "shared": c.shared,
                     "spills": c.spills, "limit": SHARED_LIMIT["sm_90"], "loops": loops,
                     "by_key": by_key})
print(json.dumps(rows))
"""

HOPPER_LISTS = """
import json, sys, torch
from ahead import SHARED_LIMIT, compile_listed
from maskdsl import Blocks, Columns, LastQ, Sink, TokenTopK, VerticalSlash, Window
vs, bf16, fp16, rows = VerticalSlash("vs"), torch.bfloat16, torch.float16, []
for mask, dtype, dim, value_dim, packed in [
    (vs, bf16, 128, 128, 1), (vs | Columns("c"), fp16, 64, 64, 4),
] if sys.argv[1] == "few" else [
    (Sink(8) | Window(512) | LastQ(128) | vs, bf16, 128, 128, 1), (vs, bf16, 64, 64, 2),
    (vs | Columns("c"), bf16, 128, 128, 1), (vs, bf16, 128, 128, 4),
    (Blocks("b", 128, 128) | Sink(4), bf16, 128, 128, 4), (Blocks("b") | vs, bf16, 96, 64, 1),
    (TokenTopK("t") - Window(64), fp16, 128, 128, 1),
]:
    c, loops = compile_listed(mask, dtype, dim, value_dim, packed)
    rows.append({"what": f"{mask!r} {dtype} {dim}/{value_dim} {packed}", "shared": c.shared,
                 "spills": c.spills, "limit": SHARED_LIMIT["sm_90"], "loops": loops,
                 "sides": packed == 1 and "VerticalSlash" in repr(mask)})
print(json.dumps(rows))
"""


SCORES = """
import json, sys, torch
from ahead import SHARED_LIMIT, compile_for
from maskdsl import (ALiBi, Bias, LastQ, RelativePosition, Sink, SinkLogits, Softcap,
                     VerticalSlash, Window)
triangle = Sink(8) | Window(512) | LastQ(128)
chip, rows = sys.argv[1], []
for mask, scores, dim in [
    (triangle, (Softcap(50.0),), 128), (triangle, (SinkLogits(),), 64), (triangle, (ALiBi(),), 128),
    (triangle, (Bias(),), 64), (triangle, (RelativePosition("t", 128),), 64),
    (Window(4096), (Softcap(50.0), SinkLogits()), 256), (VerticalSlash("vs"), (Softcap(9.0),), 64),
]:
    c = compile_for(chip, mask, torch.bfloat16, dim, scores=scores)
    rows.append({"what": f"{mask!r} {scores!r}", "shared": c.shared, "spills": c.spills,
                 "limit": SHARED_LIMIT[chip], "wgmma": "wgmma.mma_async" in c.text})
print(json.dumps(rows))
"""


def run_program(program: str, *arguments: str) -> list[dict[str, Any]]:
    """The rows a program prints, run where kernels are compiled, not interpreted."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program, *arguments], text=True,
                         capture_output=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return rows


def exhaustive(chip: str) -> Any:
    """A chip that is left out unless asked for with -m exhaustive."""
    return pytest.param(chip, marks=pytest.mark.exhaustive)


@pytest.mark.slow
def test_slots_compile_well_for_hopper() -> None:
    for row in run_program(SLOTS, "sm_90"):
        assert row["spills"] == 0 and row["shared"] <= row["limit"] and row["wgmma"], row


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_modified_scores_compile(chip: str) -> None:
    for row in run_program(SCORES, chip):
        assert row["shared"] <= row["limit"], row
        if chip == "sm_90":
            assert row["wgmma"] and row["spills"] == 0, row


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_100", "gfx942"])
def test_slots_compile_elsewhere(chip: str) -> None:
    for row in run_program(SLOTS, chip):
        assert row["shared"] <= row["limit"], row


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942", *map(
    exhaustive, ["sm_86", "sm_89", "sm_120"])])
def test_default_configs_compile_well(chip: str) -> None:
    for row in run_program(PROGRAM, chip):
        assert row["spills"] == 0, row
        assert row["shared"] <= row["limit"], row
        if chip == "sm_80" and row["half"]:
            assert row["async"], row  # loads are pipelined
        if chip in COPIES_TILES:
            assert row["tma"], row
        if chip == "sm_90" and row["half"]:
            assert row["wgmma"], row


@pytest.mark.parametrize("chip", list(map(exhaustive, [
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])))
def test_shared_memory_is_bounded(chip: str) -> None:
    """No default or candidate can exceed a chip's shared memory: the estimate that they pass is an
    upper bound of what Triton takes, and not a wild one."""
    rows = run_program(CONFIGS, chip)
    for row in rows:
        assert row["shared"] <= row["bound"], row
        assert not row["fits"] or row["shared"] <= SHARED_LIMIT[chip], row
    assert sum(row["shared"] for row in rows) >= 0.5 * sum(row["bound"] for row in rows)


def short(opcodes: list[str], keys: int = 128) -> str:
    """A loop's skeleton: products, waits for them, and exponentials, runs as one letter.

    Q: products, W: a wait for products, E: most exponentials of half a tile of `keys`, e: a few
    """
    letters = {"HGMMA": "Q", "WARPGROUP.DEPBAR": "W", "MUFU.EX2": "x"}
    text = "".join(letter for op in opcodes for start, letter in letters.items()
                   if op.startswith(start))
    text = re.sub(r"Q+", "Q", text)
    return re.sub(r"x+", lambda run: "E" if len(run[0]) > keys * 5 // 32 else "e", text)


@pytest.mark.slow
def test_hopper_kernels_overlap_products_and_softmax() -> None:
    """The loading and planning warps have 24 registers, and spill a few words there; beyond D = 128
    the computing ones do so once an item, but not in the loop over tiles. ptxas likes to move the
    wait for P V above the exponentials, which would cost a third of the speed: between the wait for
    Q K and that for P V half of them must stand (of three groups some: there are two others to fill
    the time). The others stand behind it, beside the rescaling and the conversion, as in
    FlashAttention 3. No product may be serialised (count_spills fails on ptxas' warning)."""
    for row in run_program(HOPPER, "sm_90"):
        assert row["spills"] <= row["most"], (row["what"], row["spills"])
        assert row["shared"] <= row["limit"], row["what"]
        found = [short(loop, row["keys"]) for loop in row["loops"]]
        good = [loop for loop, text in zip(row["loops"], found, strict=True)
                if re.fullmatch(row["order"], text)]
        assert good, (row["what"], found)
        assert not any(op.startswith(("LDL", "STL")) for op in min(good, key=len)), row["what"]


@pytest.mark.slow
def test_hopper_backward_overlaps_products_and_exponentials() -> None:
    """A step is S and R in flight, a wait for S, 32 exponentials under R, a wait for R, then the
    products that add up, and a wait for them; nothing in that loop spills. (The loading warps of
    the key side, with 24 registers, spill some words, and so may the computing ones once an item.)
    All that a step reads of shared memory is read beside the sums of the step before: beside S
    and R it would wait until they are done. No product may be serialised: count_spills fails on
    ptxas' warning."""
    for row in run_program(HOPPER_BACKWARD, "sm_90"):
        limit = 336 if row["by_key"] else 0
        assert row["spills"] <= limit and row["shared"] <= row["limit"], (row["what"],
                                                                        row["spills"])
        steps = [loop for loop in row["loops"] if re.fullmatch("QWeWe?QW", one_run(loop))]
        assert steps, (row["what"], [one_run(loop) for loop in row["loops"]])
        # the shortest two are those of the two warp groups; longer ones are the loops around them
        for loop in sorted(steps, key=len)[:2]:
            assert len(loop) < 550, (row["what"], len(loop))
            assert sum(op.startswith("MUFU.EX2") for op in loop) == 32, row["what"]
            assert not any(op.startswith(("LDL", "STL")) for op in loop), row["what"]
            waits = [i for i, op in enumerate(loop) if op.startswith("WARPGROUP.DEPBAR")]
            reads = [i for i, op in enumerate(loop) if op.startswith("LDS")]
            assert len(reads) >= (17 if row["by_key"] else 1) and reads[0] > waits[1], row["what"]
            assert not any(op.startswith(("RED", "ATOM")) for op in loop), row["what"]


def one_run(loop: list[str]) -> str:
    """A loop's skeleton (`short`), its runs of exponentials as one letter."""
    return re.sub("[eE]+", "e", short(loop))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["few", pytest.param("more", marks=pytest.mark.exhaustive)])
def test_hopper_kernels_of_lists_overlap_too(which: str) -> None:
    """All loops over tiles, those of one warp group's own included. The loading warps spill what
    they read of an item; a computing loop may fetch a few constants, and no more."""
    for row in run_program(HOPPER_LISTS, which):
        assert row["shared"] <= row["limit"], row["what"]
        inner = [loop for loop in row["loops"] if len(loop) < 2000]  # others are loops over items
        # one a computing warp group, and one over the tiles that it alone sees
        assert len(inner) == (4 if row["sides"] else 2), row["what"]
        for loop in inner:
            assert re.fullmatch(r"[eE]*QWEW[eE]*", short(loop)), (row["what"], short(loop))
            moved = sum(op.startswith(("LDL", "STL")) for op in loop)
            assert moved <= 32, (row["what"], moved)
