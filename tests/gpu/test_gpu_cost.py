"""Costs and dense fallback where the data lies on a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from maskdsl import (
    Full,
    LastQ,
    PerHead,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Window,
    compile,
    compile_layers,
    dense,
    study,
)
from maskdsl.cli import main
from maskdsl.codegen.hopper import is_hopper
from maskdsl.codegen.kernel import TritonForward
from maskdsl.patterns import LayerPolicy, minference

pytestmark = pytest.mark.gpu


def indices(heads: int, length: int, device: str = "cuda") -> VSIndices:
    generator = torch.Generator().manual_seed(heads)
    columns, slashes = (torch.randint(0, length, (1, heads, n), generator=generator)
                        for n in (40, 90))
    return VSIndices(columns.to(device), slashes.to(device))


def tensors(length: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device="cuda").manual_seed(length)
    return tuple(torch.randn(1, h, length, 64, device="cuda", dtype=torch.bfloat16,
                             generator=generator) for h in (4, 2, 2))


def test_lists_on_the_gpu_are_counted_as_those_on_the_cpu() -> None:
    mask = PerHead([Full(), Window(40), VerticalSlash("vs"), Sink(3) | VerticalSlash("vs")])
    attn = compile(mask)
    told = attn.explain(1500, vs=indices(4, 1500))
    same = attn.explain(1500, vs=indices(4, 1500, "cpu"))
    live = dense(attn.mask, Shape(1500, 1500), 1, 4, slots={"vs": indices(4, 1500, "cpu")})
    assert told.live_pairs == same.live_pairs == int(live.sum())
    assert told.visited == same.visited
    config: Any = attn._forward
    assert told.tile == (config.default_config(128).block_m, config.default_config(128).block_n)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_decision_does_not_wait_for_the_gpu() -> None:
    layers = compile_layers(minference(2))
    q, k, v = tensors(700)
    vs = indices(4, 700)
    expected = compile(Full())(q, k, v)
    layers(0, q, k, v, vs=vs)  # compiles
    layers._choices.clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = layers(0, q, k, v, vs=vs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layers.choices[0].is_dense and torch.equal(out, expected)


def test_without_the_policy_s_word_the_mask_runs() -> None:
    q, k, v = tensors(700)
    vs = indices(4, 700)
    for policy in (LayerPolicy([VerticalSlash("vs")]),
                   LayerPolicy([LastQ(2) | VerticalSlash("vs")])):
        out = compile_layers(policy)(0, q, k, v, vs=vs)
        assert torch.equal(out, compile(policy[0])(q, k, v, vs=vs))


def test_on_hopper_the_hopper_kernel_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `explain` counts is what the launch cuts."""
    if not is_hopper():
        pytest.skip("needs a Hopper GPU")
    from maskdsl.codegen import hopper

    seen: list[Any] = []

    def spy(*args: Any) -> Any:
        seen.append(schedule(*args))
        return seen[-1]

    schedule = hopper.schedule
    monkeypatch.setattr(hopper, "schedule", spy)
    attn = compile(Sink(8) | Window(512) | LastQ(128))
    q, k, v = tensors(30000)
    attn(q, k, v)
    told = attn.explain(30000, heads=4, kv_heads=2, head_dim=64)
    assert attn.backend == told.kernel == "hopper" and told.cut is not None and not told.refused
    assert seen == [told.cut.schedule] and told.cut.schedule.splits > 1
    assert told.prediction is not None and told.prediction.target == "hopper"
    portable = compile(Sink(8) | Window(512) | LastQ(128), backend="triton")
    named = portable.explain(30000, head_dim=256)
    assert named.kernel == "triton" and named.refused == ""
    assert isinstance(portable._forward, TritonForward)
    config = portable._forward.default_config(256)
    assert named.tile == (config.block_m, config.block_n)


def test_bench_sets_a_prediction_beside_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    if not is_hopper():
        pytest.skip("rates are measured on an H100 only")
    assert main(["bench", "Sink(8) | Window(512) | LastQ(128)", "--len", "32K", "--heads", "32",
                 "--kv-heads", "8", "--head-dim", "128", "--no-dense", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["backend"] == "hopper"
    assert 0.6 < row["predicted_ms"] / row["least_ms"] < 1.5  # the host's part is timed too


def test_study_counts_data_that_lies_on_the_gpu() -> None:
    q, k, v = tensors(700)
    told = study([(q.float(), k.float(), v.float())], {
        "vs": (VerticalSlash("vs"), lambda q, k: {"vs": indices(4, 700)})}, progress=False)
    counted = compile(VerticalSlash("vs")).explain(700, heads=4, kv_heads=2, head_dim=64,
                                                   vs=indices(4, 700))
    assert told.costs[0].tiles == pytest.approx(1 / counted.tile_speedup)
