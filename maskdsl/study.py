"""`study`: how much of real attention each pattern keeps, beside what it costs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from maskdsl.api import compile
from maskdsl.atoms import Causal, Full
from maskdsl.binding import Bound, bind_slots
from maskdsl.capture import Layer, capture
from maskdsl.columns import plural
from maskdsl.dynamic import slots_of
from maskdsl.errors import StudyError
from maskdsl.expr import Mask
from maskdsl.heads import PerHead, count_heads
from maskdsl.shape import Shape, Site
from maskdsl.study_result import Cost, Study
from maskdsl.where import Where

SCORES_AT_ONCE = 1 << 24  # elements of one block of scores, 64 MB in float32
TAIL = 64  # the last rows are always looked at: masks with LastQ treat them apart
GOLDEN = 0.6180339887  # spreads the chosen rows so that periodic masks are not met in step
Estimator = Callable[[torch.Tensor, torch.Tensor], Mapping[str, object]]
EXAMPLE = "study([(q, k, v)], {'window': Window(512)})"


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern: a mask for every layer, and what fills its slots."""

    name: str
    masks: tuple[Mask, ...]
    estimator: Estimator | None

    @property
    def is_shared(self) -> bool:
        """Whether one mask serves all layers, heads and batch entries."""
        return len(set(self.masks)) == 1 and not any(
            isinstance(node, (PerHead, Where)) for node in self.masks[0].walk()) and \
            not slots_of(self.masks[0])


def study(source: Any, patterns: Any, *, inputs: Mapping[str, Any] | Sequence[Any] | None = None,
          causal: bool = True, rows: int | None = 1024, top: int = 64,
          progress: bool = True) -> Study:
    """What each pattern keeps of the attention of given queries and keys, and its cost.

    source    layers: a list of (q, k), (q, k, v) or `Layer`; one such tuple; or a model, which is
              run once with `inputs` (`capture`). q [B, Hq, Lq, D], k [B, Hkv, Lk, D],
              v [B, Hkv, Lk, Dv]; all layers of one shape
    patterns  a dict from name to pattern, or a list. A pattern is a mask, a LayerPolicy, or
              (mask, estimator) with estimator(q, k) -> {slot: data} for masks with slots
    inputs    positional (a list) or named (a dict) inputs of the model
    causal    compare with causal attention, and intersect masks with it; False: with full attention
    rows      query rows looked at in each head: the last 64 and others spread evenly, weighted to
              stand for all; None looks at all
    top       how many of each row's largest keys `recall` asks for
    progress  show a progress bar on stderr

    For every pattern, layer and head (mean over batch):
    - mass: attention probability that falls on live keys, mean over rows; 1 is all of it
    - recall: share of each row's `top` largest keys that are live
    - error: ||sparse - dense|| / ||dense|| of the outputs, over all rows; needs v
    - pairs: live pairs over those of dense attention
    beside what `explain` says of tiles and, on chips with measured rates, of time (without the
    estimator's own).

    Works in blocks of rows: memory is a few blocks of scores, 64 MB each, beyond the inputs.
    Errors: StudyError, and those of a mask's slots.
    """
    layers = read_layers(source, inputs)
    named = read_patterns(patterns, len(layers), layers[0].q.shape[1])
    first = layers[0]
    shape = Shape(first.q.shape[2], first.k.shape[2])
    given = [[estimate(pattern, i, layer) for pattern in named] for i, layer in enumerate(layers)]
    data = [[bind_slots(pattern.masks[i], given[i][n], shape) if given[i][n] else {}
             for n, pattern in enumerate(named)] for i in range(len(layers))]
    tally = Tally(len(named), len(layers), first.q.shape[1], first.v is not None)
    places, weights = choose_rows(shape.q_len, rows)
    dense = Causal() if causal else Full()
    group = first.q.shape[1] // first.k.shape[1]
    step = max(1, SCORES_AT_ONCE // (group * max(1, shape.kv_len)))
    blocks = range(0, len(places), step)
    from tqdm import tqdm

    steps = len(blocks) * len(layers) * first.q.shape[0] * first.k.shape[1]
    with tqdm(total=steps, unit="block", file=sys.stderr, desc="study",
              disable=None if progress else True) as bar, torch.no_grad():
        for start in blocks:
            part = slice(start, start + step)
            block = Block(shape, places[part], weights[part], dense, named, top, first.q.device)
            for i, layer in enumerate(layers):
                for b, h in np.ndindex(first.q.shape[0], first.k.shape[1]):
                    block.measure(layer, i, (b, h), data[i], tally)
                    bar.update()
    costs = [find_cost(pattern, shape, first, causal, [row[n] for row in given])
             for n, pattern in enumerate(named)]
    return tally.result([p.name for p in named], costs, shape, len(places), top)


# --- what is asked --------------------------------------------------------------------------------


def read_layers(source: Any, inputs: Any) -> list[Layer]:
    """The layers of a source, all of one shape."""
    if isinstance(source, torch.nn.Module):
        if inputs is None:
            raise StudyError(f"study({type(source).__name__}, ...)", "a model needs inputs to run "
                             "on", "inputs=[token_ids] or inputs={'input_ids': token_ids}")
        return check_layers(capture(source, **inputs) if isinstance(inputs, Mapping)
                            else capture(source, *inputs))
    if isinstance(source, Layer) or (isinstance(source, tuple) and source
                                     and isinstance(source[0], torch.Tensor)):
        source = [source]
    layers = [one if isinstance(one, Layer) else Layer(*one) for one in source
              if isinstance(one, (Layer, tuple, list)) and 1 < len_of(one) < 4]
    if not layers or len(layers) != len(source):
        raise StudyError(f"study({type(source).__name__}, ...)", "layers are needed, each (q, k) "
                         "or (q, k, v)", EXAMPLE)
    return check_layers(layers)


def len_of(one: Any) -> int:
    """Entries of a tuple; a Layer counts as complete."""
    return 3 if isinstance(one, Layer) else len(one)


def check_layers(layers: list[Layer]) -> list[Layer]:
    """The layers, if their tensors fit together and are alike; else a StudyError."""
    first = layers[0]
    for i, layer in enumerate(layers):
        tensors = (layer.q, layer.k) if layer.v is None else (layer.q, layer.k, layer.v)
        if not all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in tensors):
            raise StudyError(f"layer {i}", "q, k and v must be tensors [B, H, L, D]", EXAMPLE)
        shapes = [tuple(t.shape) for t in tensors]
        told = f"layer {i} with {', '.join(map(str, shapes))}"
        if layer.q.shape != first.q.shape or layer.k.shape != first.k.shape or \
                (layer.v is None) != (first.v is None):
            raise StudyError(told, "its shapes differ from those of layer 0",
                             "one study for each kind of layer")
        if layer.q.shape[0] != layer.k.shape[0] or layer.q.shape[3] != layer.k.shape[3] or \
                layer.q.shape[1] % layer.k.shape[1] or shapes[1][:3] != shapes[-1][:3]:
            raise StudyError(told, "q, k and v do not fit together",
                             "q [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]")
        if not layer.q.shape[2] or not layer.k.shape[2]:
            raise StudyError(told, "there is nothing to attend to", "at least one token")
    return layers


def read_patterns(patterns: Any, layers: int, heads: int) -> list[Pattern]:
    """The patterns by name, each with a mask for every layer."""
    given = dict(patterns) if isinstance(patterns, Mapping) else \
        {repr(one[0] if isinstance(one, tuple) else one): one for one in patterns}
    if not given:
        raise StudyError("study without patterns", "there is nothing to compare", EXAMPLE)
    return [read_pattern(str(name), one, layers, heads) for name, one in given.items()]


def read_pattern(name: str, one: Any, layers: int, heads: int) -> Pattern:
    """One pattern, checked."""
    mask, estimator = one if isinstance(one, tuple) and len(one) == 2 else (one, None)
    masks = (mask,) * layers if isinstance(mask, Mask) else tuple(getattr(mask, "masks", ()))
    if len(masks) != layers or not all(isinstance(m, Mask) for m in masks):
        raise StudyError(f"pattern {name!r}: {mask!r}"[:200], "not a mask, nor masks for "
                         f"{plural(layers, 'layer')}",
                         "a mask, a LayerPolicy, or (mask, estimator)")
    for m in masks:
        if slots_of(m) and not callable(estimator):
            raise StudyError(f"pattern {name!r}: {m!r}", "its slots need data",
                             "(mask, lambda q, k: {'vs': estimate.vertical_slash(q, k)})")
        if count_heads(m) not in (None, heads):
            raise StudyError(f"pattern {name!r}", f"masks for {count_heads(m)} heads of {heads}",
                             f"PerHead with {heads} masks")
    return Pattern(name, masks, estimator)


def estimate(pattern: Pattern, i: int, layer: Layer) -> Mapping[str, object]:
    """The estimated data of a pattern's slots in one layer."""
    if not slots_of(pattern.masks[i]):
        return {}
    assert pattern.estimator is not None  # checked when it was read
    return pattern.estimator(layer.q, layer.k)


def choose_rows(length: int, rows: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows int64[n], weights float64[n]): the rows looked at, and how many each stands for."""
    if rows is None or rows >= length:
        return torch.arange(length), torch.ones(length, dtype=torch.float64)
    if not isinstance(rows, int) or rows < 1:
        raise StudyError(f"rows={rows!r}", "not a number of rows", "rows=1024, or None for all")
    tail = min(TAIL, rows // 2)
    others = rows - tail
    edges = torch.arange(others + 1) * (length - tail) // others
    size = edges.diff()
    jitter = (torch.arange(others, dtype=torch.float64) * GOLDEN) % 1
    chosen = edges[:-1] + (jitter * size).long()
    return (torch.cat([chosen, torch.arange(length - tail, length)]),
            torch.cat([size.double(), torch.ones(tail, dtype=torch.float64)]))


def find_cost(pattern: Pattern, shape: Shape, layer: Layer, causal: bool,
              given: Sequence[Mapping[str, object]]) -> Cost:
    """What `explain` says of a pattern, mean over layers; where slots' data decides, over the first
    and the last of the layers that have the same mask.

    given  the slots' data of every layer
    """
    shares, times = [], []
    chip = None if torch.cuda.is_available() else "H100"  # what counts is the kernel of a GPU
    for mask in dict.fromkeys(pattern.masks):
        layers = [i for i, other in enumerate(pattern.masks) if other == mask]
        asked = [layers[0], layers[-1]] if slots_of(mask) and len(layers) > 1 else layers[:1]
        attn = compile(mask, causal=causal)
        for i in asked:
            data: dict[str, Any] = dict(given[i])
            told = attn.explain(shape.q_len, shape.kv_len, batch=layer.q.shape[0],
                                heads=layer.q.shape[1], kv_heads=layer.k.shape[1],
                                head_dim=layer.q.shape[3], chip=chip, **data)
            weight = len(layers) / len(asked) / len(pattern.masks)
            shares.append(weight / max(told.tile_speedup, 1e-9))
            times.append(None if told.prediction is None else weight * told.prediction.ms)
    known = [time for time in times if time is not None]
    return Cost(float(np.sum(shares)), float(np.sum(known)) if len(known) == len(times) else None)


# --- what is measured -----------------------------------------------------------------------------


class Block:
    """Some query rows against all keys, for every pattern."""

    def __init__(self, shape: Shape, places: torch.Tensor, weights: torch.Tensor, dense: Mask,
                 patterns: list[Pattern], top: int, device: torch.device) -> None:
        self.shape, self.patterns, self.top = shape, patterns, top
        self.rows, self.weights = places.to(device), weights.to(device)
        self.p = (self.rows + shape.q_offset)[:, None]
        self.k = torch.arange(shape.kv_len, device=device)[None, :]
        self.allowed = self.ask(dense, Site.of(shape))
        self.weights = self.weights * self.allowed.any(-1)  # rows that see no key tell nothing
        self.shared = {pattern.name: self.ask(pattern.masks[0], Site.of(shape)) & self.allowed
                       for pattern in patterns if pattern.is_shared}

    def ask(self, mask: Mask, site: Site) -> torch.Tensor:
        """bool[rows, keys]."""
        live = torch.as_tensor(mask.contains(self.p, self.k, site), device=self.k.device)
        return live.to(torch.bool).broadcast_to(len(self.rows), self.shape.kv_len)

    def live(self, pattern: Pattern, layer: int, batch: int, head: int, heads: int,
             bound: Mapping[str, Bound]) -> torch.Tensor:
        """The pattern's live pairs in one head, bool[rows, keys]."""
        if pattern.name in self.shared:
            return self.shared[pattern.name]
        site = Site.of(self.shape, batch, head, heads, bound)
        return self.ask(pattern.masks[layer], site) & self.allowed

    def measure(self, layer: Layer, i: int, place: tuple[int, int],
                data: list[dict[str, Bound]], tally: Tally) -> None:
        """Add one batch entry and key/value head of one layer to the tally."""
        b, kv = place
        heads, dim = layer.q.shape[1], layer.q.shape[3]
        group = heads // layer.k.shape[1]
        q = layer.q[b, kv * group:(kv + 1) * group][:, self.rows].float()
        scale = dim ** -0.5 if layer.scale is None else layer.scale
        scores = (q * scale) @ layer.k[b, kv].float().T
        scores.masked_fill_(~self.allowed, -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num_(0.0)  # a row without a key: nothing
        best = scores.topk(min(self.top, scores.shape[-1]), -1)
        asked = best.values > -torch.inf
        v = None if layer.v is None else layer.v[b, kv].float()
        out = None if v is None else weights @ v
        for h in range(group):
            head = kv * group + h
            tally.count_dense(i, head, self.weights, self.allowed,
                              None if out is None else out[h])
            for n, pattern in enumerate(self.patterns):
                live = self.live(pattern, i, b, head, heads, data[n])
                kept = weights[h] * live
                mass = kept.sum(-1)
                found = (live.gather(1, best.indices[h]) & asked[h]).sum(-1)
                recall = found / asked[h].sum(-1).clamp(min=1)
                error = None
                if v is not None and out is not None:
                    sparse = (kept @ v) / mass.clamp(min=1e-30)[:, None]
                    error = (sparse - out[h]).square().sum(-1)
                tally.count(n, i, head, self.weights, mass, recall, live.sum(-1), error)


class Tally:
    """Weighted sums over rows, float64[patterns, layers, heads]."""

    def __init__(self, patterns: int, layers: int, heads: int, with_output: bool) -> None:
        size = (patterns, layers, heads)
        self.mass, self.recall, self.pairs, self.error = (np.zeros(size) for _ in range(4))
        self.rows, self.all_pairs, self.norm = (np.zeros(size[1:]) for _ in range(3))
        self.with_output = with_output

    def count_dense(self, layer: int, head: int, weights: torch.Tensor, allowed: torch.Tensor,
                    out: torch.Tensor | None) -> None:
        """What the pattern's numbers are divided by."""
        at = layer, head
        self.rows[at] += float(weights.sum())
        self.all_pairs[at] += float((allowed.sum(-1) * weights).sum())
        if out is not None:
            self.norm[at] += float((out.square().sum(-1) * weights).sum())

    def count(self, n: int, layer: int, head: int, weights: torch.Tensor, mass: torch.Tensor,
              recall: torch.Tensor, pairs: torch.Tensor, error: torch.Tensor | None) -> None:
        """One pattern's rows."""
        at = n, layer, head
        for total, value in ((self.mass, mass), (self.recall, recall), (self.pairs, pairs),
                             (self.error, error)):
            if value is not None:
                total[at] += float((value.double() * weights).sum())

    def result(self, names: list[str], costs: list[Cost], shape: Shape, rows: int,
               top: int) -> Study:
        """The means."""
        error = np.sqrt(self.error / np.maximum(self.norm, 1e-300)) if self.with_output else None
        return Study(tuple(names), shape.q_len, shape.kv_len, rows, top, self.mass / self.rows,
                     self.recall / self.rows, self.pairs / np.maximum(self.all_pairs, 1),
                     error, tuple(costs))
