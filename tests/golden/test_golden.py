"""Golden files: the emitted kernels, kept to be read. `make golden` writes them anew."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from maskdsl import (
    Causal,
    Chunk,
    Dilated,
    Empty,
    Full,
    LastQ,
    Mask,
    RandomBlocks,
    Sink,
    Stride,
    Where,
    Window,
    simplify,
)
from maskdsl.codegen.emit import emit_source
from maskdsl.codegen.emit_hopper import emit_hopper
from maskdsl.codegen.hopper_cut import TILE, make_plans
from maskdsl.codegen.planner import make_plan
from maskdsl.patterns import longformer

KERNELS: dict[str, tuple[Mask, int, int]] = {
    "causal": (Causal(), 128, 64),
    "triangle": (Causal() & (Sink(4) | Window(2048) | LastQ(64)), 64, 64),
    "chunk": (Causal() & Chunk(8192), 128, 64),
    "longformer": (longformer(512, 16), 64, 64),
    "strided": (Causal() & (Stride(256) | Window(128)), 64, 64),
    "random_blocks": (RandomBlocks(64, 2, seed=1) | Window(192, 192), 64, 64),
    "dilated": (Dilated(32, 4), 64, 64),
    "per_head": (Causal() & Where(lambda b, h, q, k: q - k < 128 * (h + 1)), 64, 64),
    "dense": (Full(), 128, 64),
    "empty": (Empty(), 64, 64),
}
HOPPER: dict[str, Mask] = {
    "hopper_triangle": Causal() & (Sink(4) | Window(2048) | LastQ(64)),
    "hopper_per_head": Causal() & Where(lambda b, h, q, k: q - k < 128 * (h + 1)),
}
FOLDER = Path(__file__).parent


def compare(name: str, source: str, update_golden: bool) -> None:
    ast.parse(source)
    path = FOLDER / f"{name}.txt"
    if update_golden:
        path.write_text(source)
    assert source == path.read_text(), "the emitted kernel changed: read `make golden`'s diff"


@pytest.mark.parametrize("name", HOPPER)
def test_emitted_hopper_kernel(name: str, update_golden: bool) -> None:
    compare(name, emit_hopper(make_plans(simplify(HOPPER[name]), 32, TILE)[0]), update_golden)


@pytest.mark.parametrize("name", KERNELS)
def test_emitted_kernel(name: str, update_golden: bool) -> None:
    mask, block_m, block_n = KERNELS[name]
    compare(name, emit_source(make_plan(simplify(mask), block_m, block_n)), update_golden)


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {*KERNELS, *HOPPER}


def test_full_loops_carry_no_mask() -> None:
    for name in KERNELS:
        text = (FOLDER / f"{name}.txt").read_text()
        if "# FULL tiles" in text:
            loop = text[text.index("# FULL tiles"):text.index("# MASKED tiles")]
            assert "live" not in loop
            assert "tl.where" not in loop.split("start =")[1].split("\n", 1)[1]
