"""The gradient probe against autograd on an explicit theta."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers import make_model, tokens

from maskdsl import errors

transformers = pytest.importorskip("transformers")
probe = pytest.importorskip("maskdsl.integrations.probe")
SIZES = {"sink": 2, "window": 4, "last": 3}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def explicit(model: Any, ids: torch.Tensor, answer: int) -> list[torch.Tensor]:
    """d logit / d theta of every layer, with theta made: float[L, L] each."""
    length, thetas = ids.shape[1], []

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float = 1.0,
               softcap: Any = None, s_aux: Any = None, **options: Any) -> Any:
        theta = torch.ones(length, length, requires_grad=True)
        thetas.append(theta)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) * scaling
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        p, j = torch.arange(length)[:, None], torch.arange(length)
        live = (j <= p) & (p - j < (getattr(module, "sliding_window", None) or length))
        if getattr(model.config, "attention_chunk_size", None) and module.layer_idx % 2 == 0:
            live = live & (p // 6 == j // 6)
        scores = scores.masked_fill(~live, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(1, -1, length, 1)], -1)
        weights = torch.softmax(scores, -1)[..., :length]
        return ((theta * weights) @ v).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("explicit", attend)
    transformers.AttentionMaskInterface.register("explicit", lambda **options: None)
    model.set_attn_implementation("explicit")
    model(ids, use_cache=False).logits[0, -1, answer].backward()
    return [theta.grad for theta in thetas]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "llama4"])
def test_the_gradient_of_theta(family: str) -> None:
    ids, answer, length = tokens(30), 7, 30
    result = probe.probe_layers(make_model(family), [(ids, answer)], rows=8, **SIZES)
    grads = explicit(make_model(family), ids, answer)
    p, j = torch.arange(length)[:, None], torch.arange(length)
    middle = (j <= p) & (j >= 2) & (p - j >= 4) & (p < length - 3)
    for layer, grad in enumerate(grads):
        window = 6 if layer in result.windowed else length
        inside = middle & (p - j < window)
        if family == "llama4" and layer % 2 == 0:
            inside = inside & (p // 6 == j // 6)
        expected = grad[inside].abs().mean().item()
        assert result.gradient["middle"][layer] == pytest.approx(expected, rel=1e-3)
    assert result.windowed == ((0, 2) if family != "llama" else ())


def test_the_model_is_left_as_it_was() -> None:
    model = make_model("gemma3")
    before = model(tokens(20), use_cache=False).logits
    probe.probe_layers(model, [(tokens(20), 3)], **SIZES)
    assert model.config._attn_implementation == "eager"
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(tokens(20), use_cache=False).logits, before)


def result_of(middle: list[float], windowed: tuple[int, ...] = ()) -> Any:
    zeros = dict.fromkeys(("last", "streaming"), [0.0] * len(middle))
    return probe.ProbeResult({"middle": middle, **zeros}, {}, windowed, (64, 128, 128), 1)


def test_the_rule() -> None:
    """The fewest layers that hold the share; layers with a window are not asked."""
    assert result_of([5.0, 3.0, 1.0, 1.0]).dense_layers(0.8) == (0, 1)
    assert result_of([5.0, 3.0, 1.0, 1.0]).dense_layers(0.81) == (0, 1, 2)
    assert result_of([1.0, 9.0, 2.0, 7.0], (1, 3)).dense_layers(0.6) == (2,)
    assert result_of([1.0, 2.0]).dense_layers(1.0) == (0, 1)
    with pytest.raises(errors.IntegrationError, match="share"):
        result_of([1.0]).dense_layers(0.0)


def test_the_published_curve_gives_about_the_published_layers() -> None:
    """Values read off the paper's figure for Llama-3.1-8B, in 1e-5: 16 layers stayed dense."""
    curve = [0.6] * 14 + [0.40, 0.35, 0.18, 0.13, 0.14, 0.14, 0.1] + [0.05] * 10 + [0.0]
    assert 14 <= len(result_of(curve).dense_layers()) <= 17
    assert max(result_of(curve).dense_layers()) <= 16


def test_the_plot(tmp_path: Path) -> None:
    path = result_of([1e-5, 3e-6, 0.0]).plot(tmp_path / "probe.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("samples", "told"), [([], "no sample"), ([(tokens(9), 1)], "middle")])
def test_mistakes_are_told(samples: Any, told: str) -> None:
    with pytest.raises(errors.IntegrationError, match=told):
        probe.probe_layers(make_model("llama"), samples, **SIZES)
