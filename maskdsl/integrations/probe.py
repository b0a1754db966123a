"""Which layers need all keys: the gradient probe of TriangleMix, for any transformers model.

Multiply the attention of every layer by an all-ones matrix theta; the gradient of the answer's
first logit with respect to theta[i, j] tells how much the answer depends on query i seeing key j.
Where its mean over the *middle* (no sink, outside the window, not the last queries) is small, the
middle can be left out: the triangle. theta is never made: its gradient is the sum over heads of
A[h, i, j] * (g[h, i] . v[h, j]), g the output's gradient, computed a few rows at a time.

Source: TriangleMix, arXiv 2507.21526, sections 2 and 3. The paper's code has no probe, and neither
its normalisation nor its rule for choosing layers is given; ours are told in `ProbeResult`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from maskdsl.atoms import Full
from maskdsl.errors import IntegrationError
from maskdsl.integrations.transformers import (
    LayerState,
    apply,
    attention_layers,
    chunk_of,
    describe_call,
    list_scores,
)

Tensor = torch.Tensor
NAME = "maskdsl_probe"
SECTIONS = ("middle", "last", "streaming")


@dataclass(slots=True)
class ProbeResult:
    """Means over the samples, for every layer.

    gradient  section -> for each layer the mean |d logit / d theta| over the section's live pairs
    score     section -> for each layer the mean attention weight over those pairs and all heads
    windowed  layers with a sliding window or chunks of their own
    sizes     (sink, window, last) of the sections, in tokens
    """

    gradient: dict[str, list[float]]
    score: dict[str, list[float]]
    windowed: tuple[int, ...]
    sizes: tuple[int, int, int]
    samples: int = 0
    tokens: list[int] = field(default_factory=list)

    def dense_layers(self, share: float = 0.9) -> tuple[int, ...]:
        """The layers to keep dense, sorted: the fewest that together hold `share` of the summed
        middle gradient of all layers without a window or chunks of their own. The others get the
        triangle.

        Our rule: the paper reads its choice off the curve. On the published curve of
        Llama-3.1-8B a share of 0.9 gives its 16 layers to within one.
        """
        if not 0 < share <= 1:
            raise IntegrationError(f"dense_layers(share={share!r})", "a share lies in (0, 1]",
                                   "share=0.9")
        middle = self.gradient["middle"]
        free = [i for i in range(len(middle)) if i not in self.windowed]
        order = sorted(free, key=lambda i: -middle[i])
        wanted = share * sum(middle[i] for i in free)
        chosen, held = [], 0.0
        for layer in order:
            if held >= wanted:
                break
            chosen.append(layer)
            held += middle[layer]
        return tuple(sorted(chosen))

    def plot(self, path: str | Path) -> Path:
        """Draw the gradients by layer, as figure 4 of the paper; needs matplotlib."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker

        figure, axes = pyplot.subplots(figsize=(8, 4))
        layers = range(len(self.gradient["middle"]))
        for section, style in zip(SECTIONS, ("o-", "s--", "^:"), strict=True):
            axes.plot(layers, self.gradient[section], style, label=section)
        for layer in self.dense_layers():
            axes.axvspan(layer - 0.4, layer + 0.4, color="0.9", zorder=0)
        axes.set_yscale("symlog", linthresh=max(1e-12, min(
            (g for g in self.gradient["middle"] if g > 0), default=1e-12)))
        axes.set(xlabel="layer (shaded: kept dense)", ylabel="mean |d logit / d theta|",
                 title=f"{self.samples} samples; sink, window, last = {self.sizes}")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.legend()
        figure.tight_layout()
        figure.savefig(path)
        pyplot.close(figure)
        return Path(path)


@dataclass(slots=True)
class Recorder:
    """Sums over one sample, in float64: a mean of many tiny numbers."""

    sizes: tuple[int, int, int]
    rows: int
    sums: dict[tuple[int, str], list[float]] = field(default_factory=dict)

    def record(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grad: Tensor,
               how: dict[str, Any]) -> None:
        """Add one layer: q, k, v [B, H, L, D] (k, v with fewer heads), grad like the output
        [B, L, Hq, D]. Memory: rows * L * Hq numbers at a time, three times over."""
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        grad = grad.transpose(1, 2)
        length = k.shape[2]
        keys = torch.arange(length, device=q.device)
        for first in range(0, q.shape[2], self.rows):
            part = slice(first, first + self.rows)
            p = torch.arange(first, min(first + self.rows, length), device=q.device)[:, None]
            live = (keys <= p) & (p - keys < (how["window"] or length + 1))
            if how["chunk"]:
                live = live & (keys // how["chunk"] == p // how["chunk"])
            weights = weigh(q[:, :, part], k, live, how)
            theta = (weights * (grad[:, :, part] @ v.transpose(-1, -2))).sum(1)
            for section, pairs in self.sections(p, keys, length).items():
                inside = pairs & live
                total = self.sums.setdefault((layer, section), [0.0, 0.0, 0.0])
                total[0] += float(theta.abs().double()[:, inside].sum())
                total[1] += float(weights.double().mean(1)[:, inside].sum())
                total[2] += float(inside.sum()) * q.shape[0]

    def sections(self, p: Tensor, keys: Tensor, length: int) -> dict[str, Tensor]:
        """Which pairs belong to which section (the paper's equations, with `<`: a window of n keys
        counts the query's own)."""
        sink, window, last = self.sizes
        streaming = (keys < sink) | (p - keys < window)
        late = p >= length - last
        return {"middle": ~streaming & ~late, "last": ~streaming & late, "streaming": streaming}


def weigh(q: Tensor, k: Tensor, live: Tensor, how: dict[str, Any]) -> Tensor:
    """The softmax weights of some rows, float32[B, H, rows, L], with softcap and sinks."""
    scores = (q.float() @ k.float().transpose(-1, -2)) * how["scaling"]
    if how["softcap"] is not None:
        scores = torch.tanh(scores / how["softcap"]) * how["softcap"]
    scores = scores.masked_fill(~live, -torch.inf)
    if how["sinks"] is None:
        return torch.softmax(scores, -1)
    column = how["sinks"].detach().float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


_recorder: list[Recorder] = []


def attend_and_record(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
                      dropout: float = 0.0, scaling: float | None = None,
                      softcap: float | None = None, s_aux: Tensor | None = None,
                      **options: Any) -> tuple[Tensor, None]:
    """Attention of one layer, whose output's gradient is recorded on its way back."""
    state: LayerState = module.maskdsl
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, chunk = state.window, state.chunk
    if not window and not chunk and not list_scores(softcap, s_aux):  # keeps no scores for backward
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale,
            enable_gqa=query.shape[1] != key.shape[1]).transpose(1, 2).contiguous()
    else:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        data = {} if s_aux is None else {"sinks": s_aux}
        out = state.whole(q, k, v, scale=scale, **data)  # type: ignore[call-overload]
    how = {"window": window, "chunk": chunk, "softcap": softcap, "sinks": s_aux, "scaling": scale}
    q, k, v = query.detach(), key.detach(), value.detach()
    recorder = _recorder[-1]
    out.register_hook(  # type: ignore[no-untyped-call]
        lambda grad: recorder.record(module.layer_idx, q, k, v, grad, how))
    return out, None


def probe_layers(model: Any, samples: Iterable[tuple[Tensor, int]], *, sink: int = 64,
                 window: int = 128, last: int = 128, rows: int = 128) -> ProbeResult:
    """Run the probe; the model's weights and attention are left as they were.

    model    a decoder of transformers that uses its attention interface
    samples  (input_ids int[1, L], the first token of the right answer); the paper takes 100 inputs
             of about 2000 tokens
    sink, window, last  the sections, in tokens; the paper's sizes for the probe
    rows     query rows worked on at a time: memory is rows * L * heads, beside one backward pass
             (layers with softcap, sinks or a window also keep their scores)

    IntegrationError where there is no sample, or none longer than the three sections.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    layers = attention_layers(model)
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    before, states = text._attn_implementation, [getattr(m, "maskdsl", None) for m in layers]
    wanted = [p for p in model.parameters() if p.requires_grad]
    AttentionInterface.register(NAME, attend_and_record)
    AttentionMaskInterface.register(NAME, describe_call)
    apply(model, Full(), backend="torch")
    model.set_attn_implementation({"text_config": NAME} if text is not model.config else NAME)
    result = empty_result(layers, (sink, window, last))
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for ids, answer in samples:
            _recorder.append(Recorder(result.sizes, rows))
            run_sample(model, ids, answer)
            add_sample(result, _recorder.pop(), len(layers), ids.shape[1])
    finally:
        _recorder.clear()
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.set_attn_implementation({"text_config": before} if text is not model.config
                                      else before)
        for layer, state in zip(layers, states, strict=True):
            layer.maskdsl = state
    if not result.samples:
        raise IntegrationError("probe_layers(model, [])", "there is no sample",
                               "(input_ids, answer token) pairs")
    for values in (*result.gradient.values(), *result.score.values()):
        values[:] = [value / result.samples for value in values]
    return result


def empty_result(layers: list[Any], sizes: tuple[int, int, int]) -> ProbeResult:
    """A result to add samples to."""
    windowed = tuple(i for i, m in enumerate(layers)
                     if getattr(m, "sliding_window", None) or chunk_of(m))
    zeros = {section: [0.0] * len(layers) for section in SECTIONS}
    return ProbeResult(zeros, {s: [0.0] * len(layers) for s in SECTIONS}, windowed, sizes)


def run_sample(model: Any, ids: Tensor, answer: int) -> None:
    """The answer's logit after the prompt, and its gradient back to the embeddings."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.enable_grad():
        logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=1).logits
        logits[0, -1, answer].float().backward()


def add_sample(result: ProbeResult, recorder: Recorder, layers: int, tokens: int) -> None:
    """Add one sample's means."""
    if tokens <= sum(result.sizes):
        raise IntegrationError(f"a sample of {tokens} tokens", "its middle section is empty",
                               f"more than {sum(result.sizes)} tokens, or smaller sections")
    result.samples += 1
    result.tokens.append(tokens)
    for layer in range(layers):
        for section in SECTIONS:
            grad, score, pairs = recorder.sums[layer, section]
            result.gradient[section][layer] += grad / max(pairs, 1.0)
            result.score[section][layer] += score / max(pairs, 1.0)
