"""`study`, call-time pictures and the command line on a GPU."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from maskdsl import Causal, LastQ, VerticalSlash, VSIndices, Window, study
from maskdsl.backends import pick_backend
from maskdsl.cli import main
from maskdsl.patterns import streaming_llm, triangle, vertical_slash

pytestmark = pytest.mark.gpu


def test_the_gpu_gives_the_numbers_of_the_cpu() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 2000, 64) for heads in (4, 2, 2))
    patterns = {"triangle": triangle(4, 256, 64), "streaming": streaming_llm(4, 252)}
    here = study([(q, k, v)], patterns, rows=500, progress=False)
    there = study([(q.cuda(), k.cuda(), v.cuda())], patterns, rows=500, progress=False)
    for name in ("mass", "recall", "pairs", "error"):
        assert np.allclose(getattr(here, name), getattr(there, name), atol=2e-3), name


def test_128k_tokens_fit() -> None:
    """Blocks of rows: a few GB beyond the inputs, where N x N in one byte would be 16 GB."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 131072, 128, device="cuda", dtype=torch.bfloat16)
               for heads in (8, 2, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = study([(q, k, v)], {
        "triangle": triangle(), "window": Window(4096),
        "vertical-slash": (LastQ(64) | VerticalSlash("vs"),
                           lambda q, k: {"vs": vertical_slash(q, k)})}, progress=False)
    assert torch.cuda.max_memory_allocated() - before < 6 << 30
    assert found.mass.shape == (3, 1, 8)
    assert (found.mass[0] > 0).all()


def test_pictures_take_data_from_the_gpu() -> None:
    vs = VSIndices(torch.tensor([[[5]]], device="cuda"), torch.tensor([[[0, 9]]], device="cuda"))
    page = (Causal() & VerticalSlash("vs")).to_html(None, 64, slots={"vs": vs})
    assert '"columns":[5]' in page
    (Causal() & VerticalSlash("vs")).plot(64, slots={"vs": vs})


def test_bench_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    backend = pick_backend(None, Causal())  # "hopper" on an H100
    assert f"{backend} on cuda: difference to dense" in capsys.readouterr().out
    assert main(["bench", "Sink(4) | Window(512)", "--len", "8K", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["backend"] == backend
    assert row["median_ms"] > 0
