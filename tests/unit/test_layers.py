"""Layer policies that run: dense attention where it is no slower, and where that is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskdsl import (
    BlockIndices,
    Blocks,
    Causal,
    Full,
    ListSizes,
    PerHead,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
    compile,
    compile_layers,
    dense,
    dense_attention,
    explaining,
)
from maskdsl.errors import (
    AtomArgumentError,
    BackendError,
    MaskTypeError,
    MissingSlotError,
    ShapeError,
    SlotDataError,
)
from maskdsl.patterns import LayerPolicy, minference, published_triangle_mix, triangle, triangle_mix

BIG: dict[str, Any] = {"heads": 32, "kv_heads": 8}


def indices(vertical: int, slash: int, device: str = "cpu") -> VSIndices:
    """Lists of these sizes; on "meta" they have no values at all."""
    make: dict[str, Any] = {"device": device, "dtype": torch.int32}
    return VSIndices(torch.zeros(1, 32, vertical, **make), torch.zeros(1, 32, slash, **make))


def tensors(length: int, layout: str = "bhld") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, h, length, 16, generator=generator) for h in (4, 2, 2))
    return (q, k, v) if layout == "bhld" else tuple(
        t.transpose(1, 2).contiguous() for t in (q, k, v))


def test_short_prompts_are_dense_and_long_ones_sparse_without_reading_any_list() -> None:
    layers = compile_layers(published_triangle_mix("Llama-3.1-8B-Instruct", slot="vs"),
                            backend="torch")
    on_no_device = indices(512, 2048, "meta")
    short = layers.choose(0, 4096, **BIG, vs=on_no_device)
    long = layers.choose(0, 65536, **BIG, vs=on_no_device)
    assert short.is_dense and short.mask == Causal() and "yes, dense attention runs" in short.reason
    assert not long.is_dense and long.mask == layers.attention(0).mask
    assert short.dense is not None and short.sparse is not None
    assert short.dense.ms <= short.sparse.ms and f"{short.dense.ms:.3g} ms dense" in short.reason
    assert long.dense.ms > long.sparse.ms  # type: ignore[union-attr]
    assert layers.choose(0, 4096, **BIG, vs=ListSizes(512, 2048)) == short


def test_lists_that_cover_too_much_are_dense() -> None:
    layers = compile_layers(minference(2), backend="torch")
    assert not layers.choose(0, 32768, **BIG, vs=ListSizes(512, 2048)).is_dense
    assert layers.choose(0, 32768, **BIG, vs=ListSizes(30000, 30000)).is_dense


def test_estimating_counts_where_it_is_still_to_be_done() -> None:
    layers = compile_layers(LayerPolicy([Blocks("b")], dense_fallback=True), backend="torch")
    here = layers.choose(0, 32768, **BIG, b=ListSizes(blocks=100)).sparse
    first = layers.choose(0, 32768, **BIG, b=ListSizes(blocks=100), estimator="block_topk").sparse
    assert here is not None and first is not None
    assert first.ms == pytest.approx(here.ms + first.estimate_ms) and first.estimate_ms > 0


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_what_runs_is_what_was_chosen(layout: str) -> None:
    layers = compile_layers(triangle_mix(2, [0], dense=VerticalSlash("vs"), sparse=triangle(
        4, 16, 8)), backend="torch", layout=layout)
    q, k, v = tensors(100, layout)
    few = VSIndices(torch.tensor([[[0, 3]]]), torch.tensor([[[0, 20]]]))
    out = layers(0, q, k, v, vs=few)
    exact = compile(Full(), backend="torch", layout=layout)(q, k, v)
    assert layers.choose(0, 100, heads=4, kv_heads=2, head_dim=16, vs=few).is_dense
    assert torch.equal(out, exact)
    assert layers.choices[0].is_dense and "dense attention runs" in layers.choices[0].reason
    out, lse = layers(1, q, k, v, return_lse=True)
    assert lse.shape == (1, 4, 100) and torch.equal(out, exact)


def test_a_policy_that_does_not_allow_it_and_a_compiled_mask_never_fall_back() -> None:
    policy = LayerPolicy([VerticalSlash("vs"), Window(5)])
    layers = compile_layers(policy, backend="torch")
    q, k, v = tensors(60)
    few = VSIndices(torch.tensor([[[0, 3]]]), torch.tensor([[[0, 20]]]))
    live = dense(Causal() & VerticalSlash("vs"), Shape(60, 60), 1, 4, slots={"vs": few})
    exact, _ = dense_attention(q, k, v, live)
    assert torch.allclose(layers(0, q, k, v, vs=few), exact, atol=1e-5)
    assert "does not allow it" in layers.choose(0, 60, vs=few).reason
    assert not layers.choose(0, 60, vs=few).is_dense
    allowed = compile_layers(minference(1), backend="torch")
    assert allowed.choose(0, 60, vs=few).is_dense
    assert torch.allclose(allowed.attention(0)(q, k, v, vs=few), exact, atol=1e-5)


def test_reasons_for_staying() -> None:
    policy = LayerPolicy([Full(), Window(2048), Blocks("b"), Where(lambda b, h, q, k: bool(q) > k)],
                         dense_fallback=True)
    layers = compile_layers(policy, backend="torch")
    assert "the layer is dense" in layers.choose(0, 100).reason
    same = layers.choose(1, 1024)
    assert same.is_dense and "keeps all causal pairs" in same.reason
    assert "keeps all causal pairs" not in layers.choose(1, 2049).reason
    table = BlockIndices.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 64, 64)
    assert "its data is not read" in layers.choose(2, 128, b=table).reason
    assert "cannot be compiled" in layers.choose(3, 100).reason


def test_explain_says_whether_it_falls_back_and_why() -> None:
    layers = compile_layers(minference(3), backend="torch")
    told = layers.explain(1, 4096, **BIG, vs=ListSizes(1000, 6096))
    assert "fallback      yes, dense attention runs: predicted" in str(told)
    assert told.prediction is not None and told.dense is not None
    assert told.to_dict()["fallback"].startswith("yes")
    data = VSIndices(torch.arange(30)[None, None], torch.arange(64)[None, None])
    told = layers.explain(1, 65536, heads=32, vs=ListSizes(30, 64))
    assert told.fallback.startswith("no, the mask runs")
    counted = layers.explain(1, 1000, vs=data)
    assert counted.live_pairs and counted.fallback.startswith("yes")


def test_other_chips_are_decided_with_known_rates_and_say_so(
        monkeypatch: pytest.MonkeyPatch) -> None:
    layers = compile_layers(minference(1), backend="torch", chip="H100")
    assert layers.choose(0, 100, vs=ListSizes(5, 5)).reason.endswith("on H100 SXM")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(explaining, "present_arch", lambda: "sm_80")
    there = compile_layers(minference(1), backend="torch")
    choice = there.choose(0, 100, vs=ListSizes(5, 5))
    assert "nothing was measured there" in choice.reason
    assert choice.sparse and choice.dense  # that chip has no Hopper kernel
    assert choice.sparse.target == choice.dense.target == "triton"
    told = compile(Window(8), backend="torch").explain(100)
    assert told.prediction is None and "sm_80" in str(told)
    with pytest.raises(BackendError, match="nothing was measured there"):
        compile_layers(minference(1), backend="torch", chip="A100").choose(0, 9, vs=ListSizes(5, 5))


def test_heads_of_several_kinds() -> None:
    mask = PerHead([Sink(4) | Window(64)] * 2 + [VerticalSlash("vs")] * 2)
    layers = compile_layers(LayerPolicy([mask], dense_fallback=True), backend="torch")
    assert layers.choose(0, 200, vs=ListSizes(50, 50)).is_dense
    q, k, v = tensors(200)
    few = VSIndices(torch.tensor([[[0, 3]]]), torch.tensor([[[0, 20]]]))
    assert torch.equal(layers(0, q, k, v, vs=few), compile(Full(), backend="torch")(q, k, v))


def test_mistakes_are_told() -> None:
    layers = compile_layers(minference(2), backend="torch")
    q, k, v = tensors(50)
    with pytest.raises(MaskTypeError, match="not a layer policy"):
        compile_layers(Full())  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"layers 0\.\.1"):
        layers.attention(2)
    with pytest.raises(MissingSlotError, match="ListSizes"):
        layers.choose(0, 100)
    with pytest.raises(MissingSlotError, match="needs data at the call"):
        layers(0, q, k, v)  # although dense attention would not need it
    with pytest.raises(SlotDataError, match="0 entries or more"):
        ListSizes(columns=-1)
    with pytest.raises(AtomArgumentError, match="True or False"):
        LayerPolicy([Full()], dense_fallback=1)  # type: ignore[arg-type]
    with pytest.raises(AtomArgumentError, match="one layer or more"):
        minference(0)
    assert len(layers) == 2 and "dense_fallback=True" in repr(layers)
