"""The benchmark of backward passes, its timer and its kernels replaced: rows, and a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._functorch import config

import maskdsl
from benchmarks import backward, backward_sweep
from benchmarks.cases import TRIANGLES, Pattern
from benchmarks.measure import Report
from maskdsl.codegen.kernel import interpreting
from maskdsl.codegen.tune import Config


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(length: int, dim: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(length)
        return tuple(torch.randn(1, h, length, 16, generator=generator) for h in (2, 1, 1))

    def kernels(pattern: Pattern, length: int, dim: int) -> dict[str, Callable[[], Any]]:
        attn = maskdsl.compile(pattern.mask, backend="torch")

        def broken() -> Any:
            raise RuntimeError("no such kernel")

        return {"ours": lambda: attn, "same": lambda: attn, "none": broken,
                "wrong": lambda: lambda q, k, v: attn(q, k, v, scale=0.9)}

    def timed(function: Callable[[], Any]) -> float:
        function()
        return 2.0

    monkeypatch.setattr(backward, "LENGTH", 64)
    monkeypatch.setattr(backward, "make_inputs", inputs)
    monkeypatch.setattr(backward, "kernels_of", kernels)
    monkeypatch.setattr(backward, "time_ms", timed)
    report = Report("backward")
    backward.run(report)
    assert [row["kernel"] for row in report.rows] == ["ours", "same", "none", "wrong"] * 8
    ours, same, none, wrong = report.rows[:4]
    assert ours["ms_over_portable"] == same["ms_over_portable"] == 1
    assert same["gap_to_portable"] == 0
    assert "no such kernel" in none["failed"] and "differ" in wrong["failed"]
    assert config.donated_buffer is False


def test_five_products() -> None:
    pattern = TRIANGLES[1]
    assert backward.gradient_flops(pattern, 1000) == 10 * 128 * 32 * pattern.pairs(1000)
    assert "FlexAttention" in backward.kernels_of(pattern, 1000)


@pytest.mark.skipif(not interpreting(), reason="a rehearsal of the code; on a GPU run it")
def test_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each walk alone, each config really in use; one that cannot run is a row too."""
    tensors = tuple(torch.randn(1, h, 32, 16) for h in (2, 1, 1))
    monkeypatch.setattr(backward_sweep, "LENGTH", 32)
    monkeypatch.setattr(backward_sweep, "PATTERNS", (Pattern(2, 8, 4),))
    monkeypatch.setattr(backward_sweep, "KEY_CONFIGS", [Config(16, 32, 4, 1), Config(24, 32, 4, 1)])
    monkeypatch.setattr(backward_sweep, "QUERY_CONFIGS", [Config(32, 16, 4, 1)])
    monkeypatch.setattr(backward_sweep, "make_inputs", lambda length: tensors)
    report = Report("backward_sweep")
    backward_sweep.run(report)
    rows = [(row["walk"], row["tile"], row["tma"], "failed" in row) for row in report.rows]
    assert rows == [("by key", "16x32", True, False), ("by key", "16x32", False, False),
                    ("by key", "24x32", True, True), ("by query", "32x16", True, False),
                    ("by query", "32x16", False, False)]
