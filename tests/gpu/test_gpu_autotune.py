"""`autotune=True` on a GPU: timed once, read by another process, right results, graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Case, check_case, make_inputs

import maskdsl
from maskdsl import LastQ, Sink, VerticalSlash, VSIndices, Window
from maskdsl.codegen.choices import Tuner, time_call
from maskdsl.errors import BackendError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="needs a GPU")]
TRIANGLE = Sink(8) | Window(512) | LastQ(128)
AUTOTUNE = {"autotune": True}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a tuner without memory."""
    monkeypatch.setenv("MASKDSL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("maskdsl.codegen.autotune.TUNER", Tuner(time_call))
    return tmp_path / "tuned"


def inputs(length: int = 2048, dim: int = 128) -> tuple[torch.Tensor, ...]:
    return make_inputs(Case(TRIANGLE, length, length, 1, 8, 2, dim, dtype=torch.bfloat16), "cuda")


def test_the_fastest_of_all_candidates_runs() -> None:
    q, k, v = inputs()
    attn, plain = maskdsl.compile(TRIANGLE, **AUTOTUNE), maskdsl.compile(TRIANGLE)
    torch.testing.assert_close(attn(q, k, v), plain(q, k, v), rtol=2e-2, atol=2e-2)
    (made,) = attn.tuned
    times = dict(made.times)
    assert made.source == "timed" and len(times) + len(made.failed) >= 2
    assert times[made.setting] <= 1.01 * min(times.values())
    assert all(0 < ms < 1000 for ms in times.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_against_dense(dtype: torch.dtype, dim: int) -> None:
    check_case(Case(TRIANGLE, 700, 1000, 1, 4, 2, dim, dtype=dtype, options=AUTOTUNE), "cuda")


def test_no_default_or_candidate_runs_out_of_shared_memory() -> None:
    for dim in (64, 96, 128, 192, 256):
        attn = maskdsl.compile(TRIANGLE, backend="triton", **AUTOTUNE)
        attn(*inputs(512, dim))
        assert attn.tuned[0].failed == ()


def test_lists_are_timed_with_their_data() -> None:
    q, k, v = inputs()
    found: Any = {"vs": VSIndices(torch.randint(2048, (1, 8, 100), device="cuda"),
                                  torch.randint(2048, (1, 8, 60), device="cuda"))}
    attn = maskdsl.compile(VerticalSlash("vs"), **AUTOTUNE)
    expected = maskdsl.compile(VerticalSlash("vs"))(q, k, v, **found)
    torch.testing.assert_close(attn(q, k, v, **found), expected, rtol=2e-2, atol=2e-2)
    assert len(attn.tuned) == 1


PROGRAM = """
import torch, maskdsl
from maskdsl import LastQ, Sink, Window
q = torch.randn(1, 8, 2048, 128, device="cuda", dtype=torch.bfloat16)
k, v = (torch.randn(1, 2, 2048, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
attn = maskdsl.compile(Sink(8) | Window(512) | LastQ(128), autotune=True)
attn(q, k, v)
print(attn.tuned[0].source, attn.tuned[0].setting)
"""


def test_another_process_does_not_time() -> None:
    attn = maskdsl.compile(TRIANGLE, **AUTOTUNE)
    attn(*inputs())
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True,
                         check=True)
    assert run.stdout.strip() == f"file {attn.tuned[0].setting}"


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_graphs_need_a_known_choice() -> None:
    q, k, v = inputs()
    attn = maskdsl.compile(TRIANGLE, **AUTOTUNE)
    torch.cuda.synchronize()
    with pytest.raises(BackendError, match="before the capture"), \
            torch.cuda.graph(torch.cuda.CUDAGraph()):
        attn(q, k, v)
    expected = attn(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attn(q, k, v)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
