"""The comparison on a GPU, short: ours and what is part of torch agree with float32."""

import math

import pytest
import torch

from benchmarks.cases import Case, Pattern
from benchmarks.compare import Runner
from benchmarks.peers import choose_peers

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("pattern", [Pattern(), Pattern(window=300), Pattern(64, 256, 128)])
def test_rows_of_a_short_call(pattern):
    peers = choose_peers(["portable", "flex", "sdpa-flash"])
    runner = Runner(peers, limit=120.0, check_length=1024)
    runner.run(Case(pattern, 2048, heads=4, kv_heads=1))
    names = [peer.name for peer in peers if peer.expresses(pattern)]
    assert [row["kernel"] for row in runner.done] == names
    for row in runner.done:
        assert "failed" not in row, row
        assert row["error"] < 0.005 and row["ms"] > 0 and math.isfinite(row["tflops"])
    assert runner.done[0]["visited_tflops"] >= runner.done[0]["tflops"]
