"""`study` against the plain computation, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import masks

from maskdsl import (
    Causal,
    Full,
    LastQ,
    Layer,
    Mask,
    PerHead,
    Shape,
    Sink,
    VerticalSlash,
    VSIndices,
    Window,
    capture,
    compile,
    dense,
    dense_attention,
    study,
)
from maskdsl import study as study_function
from maskdsl.errors import StudyError
from maskdsl.patterns import triangle, triangle_mix
from maskdsl.study import choose_rows


def make(q_len: int = 50, kv_len: int | None = None, batch: int = 2, seed: int = 0,
         dim: int = 16) -> Layer:
    g = torch.Generator().manual_seed(seed)
    size = (q_len, kv_len or q_len, kv_len or q_len)
    return Layer(*(2 * torch.randn(batch, h, n, dim, generator=g)
                   for h, n in zip((4, 2, 2), size, strict=True)))


def plain(layer: Layer, mask: Mask, top: int, slots: Any = None) -> dict[str, np.ndarray]:
    """The same numbers the plain way, [heads]; square matrices."""
    shape = Shape(layer.q.shape[2], layer.k.shape[2])
    batch, heads = layer.q.shape[:2]
    allowed = dense(Causal(), shape, batch, heads)
    live = dense(mask, shape, batch, heads, slots=slots) & allowed
    k = layer.k.repeat_interleave(2, 1)
    scores = (layer.q @ k.transpose(-1, -2)) * (layer.scale or 16 ** -0.5)
    scores = scores.masked_fill(~allowed, -torch.inf)
    used = allowed.any(-1)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    wanted = (rank < top) & allowed
    recall = (wanted & live).sum(-1) / wanted.sum(-1).clamp(min=1)
    assert layer.v is not None
    exact, _ = dense_attention(layer.q, layer.k, layer.v, allowed, layer.scale)
    sparse, _ = dense_attention(layer.q, layer.k, layer.v, live, layer.scale)
    mean = [x.sum((0, 2)) / used.sum((0, 2)) for x in ((p * live).sum(-1), recall)]
    error = ((sparse - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).sqrt()
    return {"mass": mean[0].numpy(), "recall": mean[1].numpy(), "error": error.numpy(),
            "pairs": (live.sum((0, 2, 3)) / allowed.sum((0, 2, 3))).numpy()}


def check(told: Any, n: int, layer: int, expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        assert np.allclose(getattr(told, name)[n, layer], value, atol=1e-4), name


@settings(max_examples=8)
@given(masks(2), st.sampled_from([(50, 50), (20, 45), (45, 20)]), st.sampled_from([1, 5, 100]))
def test_the_numbers_are_those_of_dense_attention(mask: Mask, size: tuple[int, int],
                                                  top: int) -> None:
    layers = [make(*size), make(*size, seed=1)]
    told = study(layers, {"it": mask, "all": Full()}, rows=None, top=top, progress=False)
    for i, layer in enumerate(layers):
        check(told, 0, i, plain(layer, mask, top))
    assert np.allclose(told.mass[1], 1)
    assert np.allclose(told.pairs[1], 1)
    assert np.allclose(told.error[1], 0, atol=1e-5)


def test_heads_slots_and_layers_of_their_own() -> None:
    layers = [make(), make(seed=1)]
    vs = VSIndices(torch.tensor([[[3, 9]]]), torch.tensor([[[0, 4]]]))
    per_head = PerHead([Window(3), Causal(), Sink(2), Window(9)])
    told = study(layers, {
        "heads": per_head, "mix": triangle_mix(2, [0], sparse=Window(4)),
        "vs": (Sink(1) | VerticalSlash("vs"), lambda q, k: {"vs": vs})},
        rows=None, top=8, progress=False)
    for i, layer in enumerate(layers):
        check(told, 0, i, plain(layer, per_head, 8))
        check(told, 1, i, plain(layer, Window(4) if i else Full(), 8))
        check(told, 2, i, plain(layer, Sink(1) | VerticalSlash("vs"), 8, {"vs": vs}))
    counted = compile(Sink(1) | VerticalSlash("vs")).explain(
        layers[0].q.shape[2], batch=layers[0].q.shape[0], heads=4, vs=vs, chip="H100",
        kv_heads=layers[0].k.shape[1], head_dim=layers[0].q.shape[3])
    assert told.costs[2].tiles == pytest.approx(1 / counted.tile_speedup)
    assert told.costs[2].ms is not None
    assert told.costs[1].tiles is not None


def test_sampled_rows_stand_for_all() -> None:
    layer = make(2000, batch=1)
    patterns = {"triangle": triangle(4, 64, 16), "window": Window(200)}
    some = study([layer], patterns, rows=400, progress=False)
    all_ = study([layer], patterns, rows=None, progress=False)
    assert some.rows == 400
    for name, close in (("mass", 0.02), ("recall", 0.02), ("pairs", 0.01), ("error", 0.05)):
        assert np.abs(getattr(some, name) - getattr(all_, name)).max() < close, name


@given(st.integers(1, 5000), st.integers(1, 600))
def test_chosen_rows_are_distinct_and_weigh_as_much_as_all(length: int, rows: int) -> None:
    places, weights = choose_rows(length, rows)
    assert len(places) == min(length, rows)
    assert (places.diff() > 0).all()
    assert int(weights.sum()) == length
    assert int(places[-1]) < length


class TinyModel(torch.nn.Module):
    """Two layers of attention; every other one with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, projection in enumerate(self.projections):
            q, k, v = (t.view(1, -1, 2, 16).transpose(1, 2)
                       for t in projection(x).chunk(3, -1))
            x = torch.nn.functional.scaled_dot_product_attention(
                q, k, value=v, is_causal=True, scale=0.5 if i else None)
            x = x.transpose(1, 2).reshape(1, -1, 32)
        return x


def test_a_model_is_captured() -> None:
    model, x = TinyModel(), torch.randn(1, 30, 32)
    layers = capture(model, x)
    assert [layer.scale for layer in layers] == [None, 0.5]
    assert not layers[0].q.requires_grad
    assert len(capture(model, x=x, layers=[1])) == 1
    told = study(model, [Window(4)], inputs=[x], progress=False)
    assert told.mass.shape == (1, 2, 2)
    again = study(layers, [Window(4)], progress=False)
    assert np.array_equal(told.mass, again.mass)


def test_a_model_without_attention_is_told() -> None:
    with pytest.raises(StudyError, match="never called"):
        capture(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(StudyError, match="none of layers"):
        capture(TinyModel(), torch.zeros(1, 4, 32), layers=[7])
    with pytest.raises(StudyError, match="inputs"):
        study(TinyModel(), [Window(4)])


@pytest.mark.parametrize(("layers", "patterns", "told"), [
    ([], [Window(4)], "layers are needed"), ([torch.zeros(2)], [Window(4)], "layers are needed"),
    ([make(8), make(9)], [Window(4)], "differ from those of layer 0"),
    ([(make(8).q, make(9).k, make(8).v)], [Window(4)], "do not fit"),
    ([make(8)], {}, "nothing to compare"), ([make(8)], {"a": 3}, "not a mask"),
    ([make(8)], {"a": triangle_mix(3, [0])}, "nor masks for 1 layer"),
    ([make(8)], {"a": VerticalSlash("vs")}, "slots need data"),
    ([make(8)], {"a": PerHead([Causal()])}, "1 heads of 4")])
def test_what_cannot_be_studied_is_told(layers: Any, patterns: Any, told: str) -> None:
    with pytest.raises(StudyError, match=told):
        study(layers, patterns, progress=False)


def test_tables_and_pictures(tmp_path: Path) -> None:
    layer = make(300, batch=1, dim=96)  # (up to 64 dense attention has tiles of its own)
    told = study_function((layer.q, layer.k, layer.v),
                          {"wide": Window(64), "thin": Window(16), "all": Causal(),
                           "bad": LastQ(120)}, rows=None, progress=False)
    text = str(told)
    assert "Pareto front of mass over tiles: wide, all" in text  # as many tiles, more mass
    assert [told.names[i] for i in told.front()] == ["wide", "all"]
    assert [told.names[i] for i in told.front("pairs")] == ["thin", "wide", "all"]
    assert told.plot(cost="ms").axes[0].get_xlabel() == "predicted milliseconds a layer"
    with pytest.raises(StudyError, match="no such cost"):
        told.front("euros")
    assert text.count("\n") == 6
    assert "1 layer of 4 heads" in text
    assert "<td>thin</td>" in told._repr_html_()
    assert set(told.to_dict()["patterns"]["thin"]) == {"mass", "recall", "pairs", "tiles", "ms",
                                                      "error"}
    assert len(told.plot(tmp_path / "p.png").axes) == 2
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    image = told.plot_heads("thin").axes[0].images[0].get_array()
    assert np.allclose(image, 100 * told.mass[1])
    with pytest.raises(StudyError, match="no such pattern"):
        told.plot_heads("thick")
    without = study_function([(layer.q, layer.k)], [Window(4)], progress=False)
    assert without.error is None
    assert len(without.plot().axes) == 1
    with pytest.raises(StudyError):
        without.plot_heads("Window(4)", "error")


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    study([make(64)], [Window(4)])
    told = capsys.readouterr()
    assert told.out == ""
