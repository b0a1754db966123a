"""Every pattern against its paper's formula, in plain loops over queries and keys."""

from __future__ import annotations

import doctest
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import maskdsl
from maskdsl import patterns
from maskdsl.atoms import Causal
from maskdsl.dense import dense
from maskdsl.errors import AtomArgumentError
from maskdsl.expr import Mask, from_json
from maskdsl.patterns import classic, trianglemix
from maskdsl.shape import Shape
from maskdsl.simplify import simplify
from maskdsl.tiles import rasterise

Live = npt.NDArray[np.bool_]
LENGTHS = [1, 2, 7, 16, 33]


def grid(n: int, sees: Callable[[int, int], bool]) -> Live:
    """bool[n, n] by asking `sees(q, k)` for every pair."""
    live = np.zeros((n, n), dtype=bool)
    for q in range(n):
        for k in range(n):
            live[q, k] = sees(q, k)
    return live


def drawn(mask: Mask, n: int) -> Live:
    result: Live = dense(mask, Shape(n, n))[0, 0].numpy()
    return result


# --- the papers' formulas -----------------------------------------------------------------------
# Each gives bool[n, n] of *all* pairs the model lets through, causal where the paper is.


def paper_sliding_window(n: int, window: int) -> Live:
    return grid(n, lambda q, k: k in range(q - window + 1, q + 1))


def paper_dilated_window(n: int, window: int, step: int) -> Live:
    return grid(n, lambda q, k: k in [q - i * step for i in range(window)])


def paper_chunked(n: int, size: int) -> Live:
    # The keys from the start of the query's chunk up to the query.
    return grid(n, lambda q, k: k in range(q - q % size, q + 1))


def paper_prefix_lm(n: int, prefix: int) -> Live:
    return grid(n, lambda q, k: k in range(max(prefix, q + 1)))


def paper_streaming_llm(n: int, n_sink: int, window: int) -> Live:
    def sees(q: int, k: int) -> bool:
        seen = list(range(q + 1))
        return k in seen[:n_sink] or (window > 0 and k in seen[-window:])

    return grid(n, sees)


def paper_triangle(n: int, sink: int, window: int, last: int) -> Live:
    # M_streaming + M_last, rows i and columns j from 1; a window of `window` keys, as the code.
    def sees(q: int, k: int) -> bool:
        i, j = q + 1, k + 1
        streaming = i >= j and (j <= sink or i - j <= window - 1)
        tail = i >= j and n - i < last and j > sink and i - j > window - 1
        return streaming or tail

    return grid(n, sees)


def paper_longformer(n: int, window: int, n_global: int, causal: bool) -> Live:
    def sees(q: int, k: int) -> bool:
        if causal:
            return k <= q and (q - k < window or k in range(n_global))
        near = q - window / 2 <= k <= q + window / 2
        return near or q in range(n_global) or k in range(n_global)

    return grid(n, sees)


def paper_strided(n: int, stride: int) -> Live:
    def sees(q: int, k: int) -> bool:
        first = set(range(max(0, q - stride), q + 1))
        second = {j for j in range(q + 1) if (q - j) % stride == 0}
        return k in first | second

    return grid(n, sees)


def paper_fixed(n: int, stride: int, c: int) -> Live:
    def sees(q: int, k: int) -> bool:
        first = {j for j in range(q + 1) if j // stride == q // stride}
        second = {j for j in range(q + 1) if j % stride in range(stride - c, stride + 1)}
        return k in first | second

    return grid(n, sees)


def paper_longnet(n: int, segments: tuple[int, ...], dilations: tuple[int, ...]) -> Live:
    # Gather the rows of every segment at every head offset, and let them see one another.
    live = np.zeros((n, n), dtype=bool)
    for w, r in zip(segments, dilations, strict=True):
        for start in range(0, n, w):
            for offset in range(r):
                rows = range(start + offset, min(start + w, n), r)
                for q in rows:
                    for k in rows:
                        live[q, k] |= k <= q
    return live


def paper_bigbird(n: int, block: int, n_window: int, n_global: int, n_random: int = 0) -> Live:
    # Without the random blocks, which no formula of the paper gives.
    assert n_random == 0

    def sees(q: int, k: int) -> bool:
        w, g = n_window * block, n_global * block
        return q - w / 2 <= k <= q + w / 2 or q < g or k < g

    return grid(n, sees)


Formula = Callable[[int, dict[str, Any]], Live]
Case = tuple[str, dict[str, Any], Formula, bool]


def cases(name: str, formula: Callable[..., Live], causal: bool,
          arguments: list[dict[str, Any]], rename: dict[str, str] | None = None) -> list[Case]:
    """One case for each set of arguments; `rename` maps the pattern's names to the formula's."""
    names = rename or {}

    def renamed(n: int, given: dict[str, Any]) -> Live:
        return formula(n, **{names.get(key, key): value for key, value in given.items()})

    return [(name, given, renamed, causal) for given in arguments]


CASES: list[Case] = [
    *cases("sliding_window", paper_sliding_window, True, [{"window": w} for w in (0, 1, 4, 40)]),
    *cases("dilated_window", paper_dilated_window, True,
           [{"window": w, "step": s} for w, s in ((1, 1), (3, 1), (3, 2), (2, 5), (20, 3))]),
    *cases("chunked", paper_chunked, True, [{"size": s} for s in (1, 3, 8, 64)]),
    *cases("prefix_lm", paper_prefix_lm, False, [{"n": n} for n in (0, 1, 5, 50)],
           {"n": "prefix"}),
    *cases("streaming_llm", paper_streaming_llm, True,
           [{"n_sink": s, "window": w} for s, w in ((0, 3), (2, 5), (4, 1), (3, 0), (1, 50))]),
    *cases("tri_shape", paper_triangle, True,
           [{"n_init": s, "n_local": w, "n_last": t}
            for s, w, t in ((0, 1, 0), (2, 4, 3), (1, 5, 1), (3, 2, 100))],
           {"n_init": "sink", "n_local": "window", "n_last": "last"}),
    *cases("triangle", paper_triangle, True,
           [{"sink": s, "window": w, "last": t}
            for s, w, t in ((0, 1, 0), (2, 4, 3), (1, 5, 1), (3, 2, 100))]),
    *cases("longformer", paper_longformer, False,
           [{"window": w, "n_global": g, "causal": False}
            for w, g in ((0, 0), (2, 1), (6, 0), (8, 3), (50, 2))]),
    *cases("longformer", paper_longformer, True,
           [{"window": w, "n_global": g, "causal": True} for w, g in ((1, 0), (3, 1), (8, 4))]),
    *cases("sparse_transformer_strided", paper_strided, True,
           [{"stride": s} for s in (1, 2, 5, 8, 40)]),
    *cases("sparse_transformer_fixed", paper_fixed, True,
           [{"stride": s, "c": c} for s, c in ((1, 1), (4, 1), (5, 2), (8, 8), (9, 7), (40, 3))]),
    *cases("longnet", paper_longnet, True,
           [{"segments": s, "dilations": r} for s, r in (
               ((4,), (1,)), ((6,), (3,)), ((4, 8), (1, 2)), ((7, 16), (2, 6)),
               ((2, 4, 8, 16, 32), (1, 2, 4, 6, 12)), ((3,), (5,)))]),
    *cases("bigbird", paper_bigbird, False,
           [{"block": b, "n_window": w, "n_global": g, "n_random": 0}
            for b, w, g in ((1, 1, 0), (2, 3, 1), (4, 3, 2), (3, 1, 1), (8, 2, 0))]),
]
IDS = [f"{name}-{'-'.join(map(str, given.values()))}" for name, given, _, _ in CASES]
RANDOM = [patterns.bigbird(b, w, g, r, seed)
          for b, w, g, r, seed in ((2, 1, 1, 1, 0), (4, 3, 1, 2, 7), (3, 2, 0, 4, 1))]
DEFAULTS = [patterns.streaming_llm(), patterns.bigbird(), patterns.chunked(), patterns.tri_shape(),
            patterns.triangle(), patterns.longnet(), patterns.longformer(512),
            patterns.sparse_transformer_strided(128), patterns.sparse_transformer_fixed(128, 32)]


def build(name: str, given: dict[str, Any]) -> Mask:
    mask: Mask = getattr(patterns, name)(**given)
    return mask


MASKS = [build(name, given) for name, given, _, _ in CASES] + RANDOM + DEFAULTS


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(("name", "given", "formula", "causal"), CASES, ids=IDS)
def test_pattern_is_the_papers_set(name: str, given: dict[str, Any],
                                   formula: Formula, causal: bool, n: int) -> None:
    mask = build(name, given)
    np.testing.assert_array_equal(drawn(mask & Causal() if causal else mask, n),
                                  formula(n, given))


@pytest.mark.parametrize("mask", [
    patterns.longnet((4, 8), (1, 2)), patterns.longnet((6,), (3,)), patterns.dilated_window(3, 2),
    patterns.sliding_window(5),
], ids=repr)
def test_causal_by_itself(mask: Mask) -> None:
    np.testing.assert_array_equal(drawn(mask, 24), drawn(mask & Causal(), 24))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_repr_evaluates_back(mask: Mask) -> None:
    assert eval(repr(mask), dict(vars(maskdsl))) == mask


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_json_round_trip(mask: Mask) -> None:
    assert from_json(mask.to_json()) == mask


@pytest.mark.parametrize("shape", [Shape(33, 33), Shape(5, 21), Shape(21, 5), Shape(8, 16, 4, 40)],
                         ids=repr)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_spans_are_the_dense_mask(mask: Mask, shape: Shape) -> None:
    for m in (mask, mask & Causal()):
        np.testing.assert_array_equal(rasterise(m, shape), dense(m, shape)[0, 0].numpy())


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_simplified_pattern_is_the_same_set(mask: Mask) -> None:
    np.testing.assert_array_equal(drawn(simplify(mask & Causal()), 40), drawn(mask & Causal(), 40))


# --- BigBird's random blocks --------------------------------------------------------------------


@pytest.mark.parametrize(("block", "n_random"), [(2, 1), (4, 2), (3, 5), (1, 3)])
def test_bigbird_random_part_is_whole_blocks(block: int, n_random: int) -> None:
    n = 16 * block
    live = drawn(patterns.bigbird(block, 1, 1, n_random, seed=5), n)
    base = paper_bigbird(n, block, 1, 1)
    assert live[base].all()
    drawn_blocks = 0
    for start in range(0, n, block):
        rows = slice(start, start + block)
        extra = {int(k) // block for k in np.nonzero((live & ~base)[rows].any(axis=0))[0]}
        assert len(extra) <= n_random
        drawn_blocks += len(extra)
        for b in extra:
            assert live[rows, b * block:(b + 1) * block].all()
    assert drawn_blocks >= n_random * 4  # of 15 non-global rows; some draws fall on the base


def test_bigbird_seed_and_count_matter() -> None:
    one, other = patterns.bigbird(2, 1, 1, 2, seed=0), patterns.bigbird(2, 1, 1, 2, seed=1)
    assert one == patterns.bigbird(2, 1, 1, 2)
    assert (drawn(one, 64) != drawn(other, 64)).any()
    more = drawn(patterns.bigbird(2, 1, 1, 6), 64)
    assert more[drawn(one, 64)].all()
    assert more.sum() > drawn(one, 64).sum()


# --- sizes of the real thing --------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "n", "row", "keys"), [
    (patterns.streaming_llm(), 5000, 4999, 2048),
    (patterns.triangle(), 3000, 2871, 520),
    (patterns.triangle(), 3000, 2872, 2873),
    (patterns.tri_shape(), 5000, 4899, 4096),
    (patterns.tri_shape(), 5000, 4900, 4901),
    (patterns.sliding_window(4096), 5000, 4999, 4096),
    (patterns.dilated_window(16, 4), 300, 299, 16),
    (patterns.chunked(), 8195, 8194, 3),
    (patterns.sparse_transformer_strided(128), 2000, 1999, 128 + 1999 // 128),
    (patterns.sparse_transformer_fixed(128, 8), 2000, 1999, 1999 % 128 + 1 + 8 * (1999 // 128)),
    (patterns.longformer(512, 3, causal=True), 2000, 1999, 515),
], ids=repr)
def test_keys_of_one_row(mask: Mask, n: int, row: int, keys: int) -> None:
    live = dense(mask & Causal(), Shape(1, n, row, n))
    assert int(live.sum()) == keys


def test_longformer_keys_of_one_row() -> None:
    assert int(dense(patterns.longformer(512, 3), Shape(1, 2000, 1000)).sum()) == 513 + 3


def test_strided_reaches_the_start_and_fits_int32() -> None:
    far = 1 << 28
    mask = patterns.sparse_transformer_strided(128)
    assert mask.contains(far, 0, Shape(1, 1))
    assert not mask.contains(far, 1, Shape(1, 1))
    for stride in (1, 3, 128, 2**20 + 7, 2**30):
        for node in patterns.sparse_transformer_strided(stride).walk():
            if isinstance(node, maskdsl.Dilated):
                assert node.window * node.step <= 2**30


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "wrote"), [
    (lambda: patterns.sliding_window(-1), "Window(left=-1)"),
    (lambda: patterns.dilated_window(4, 0), "Dilated(step=0)"),
    (lambda: patterns.chunked(0), "Chunk(size=0)"),
    (lambda: patterns.prefix_lm(2.5), "PrefixLM(n=2.5)"),  # type: ignore[arg-type]
    (lambda: patterns.streaming_llm(-4), "Sink(n=-4)"),
    (lambda: patterns.streaming_llm(4, True), "Window(left=True)"),
    (lambda: patterns.tri_shape(n_last=-1), "LastQ(n=-1)"),
    (lambda: patterns.triangle(sink="8"), "Sink(n='8')"),  # type: ignore[arg-type]
    (lambda: patterns.longformer(7), "longformer(window=7)"),
    (lambda: patterns.longformer(-2), "longformer(window=-2)"),
    (lambda: patterns.longformer(8.0), "longformer(window=8.0)"),  # type: ignore[arg-type]
    (lambda: patterns.longformer(8, -1), "Sink(n=-1)"),
    (lambda: patterns.bigbird(block=0), "bigbird(block=0)"),
    (lambda: patterns.bigbird(n_window=0), "bigbird(n_window=0)"),
    (lambda: patterns.bigbird(n_global=-1), "bigbird(n_global=-1)"),
    (lambda: patterns.bigbird(n_random=-1), "bigbird(n_random=-1)"),
    (lambda: patterns.bigbird(n_random=65), "RandomBlocks(64, 65)"),
    (lambda: patterns.bigbird(seed=-1), "RandomBlocks(seed=-1)"),
    (lambda: patterns.sparse_transformer_strided(0), "sparse_transformer_strided(stride=0)"),
    (lambda: patterns.sparse_transformer_strided(2**31), "Window(left=2147483648)"),
    (lambda: patterns.sparse_transformer_fixed(0), "sparse_transformer_fixed(stride=0)"),
    (lambda: patterns.sparse_transformer_fixed(4, 0), "sparse_transformer_fixed(c=0)"),
    (lambda: patterns.sparse_transformer_fixed(4, 5), "sparse_transformer_fixed(stride=4, c=5)"),
    (lambda: patterns.longnet((), ()), "longnet((), ())"),
    (lambda: patterns.longnet((4, 8), (1,)), "longnet((4, 8), (1,))"),
    (lambda: patterns.longnet((4, 0), (1, 2)), "longnet(segments[1]=0)"),
    (lambda: patterns.longnet((4,), (0,)), "longnet(dilations[0]=0)"),
    (lambda: patterns.longnet(4, (1,)), "longnet(segments=4)"),  # type: ignore[arg-type]
    (lambda: patterns.longnet((4,), "1"), "longnet(dilations='1')"),  # type: ignore[arg-type]
])
def test_bad_arguments(call: Callable[[], Mask], wrote: str) -> None:
    with pytest.raises(AtomArgumentError) as caught:
        call()
    assert caught.value.wrote == wrote
    assert caught.value.wrong and caught.value.instead


def test_numpy_integers_are_integers() -> None:
    eight: Any = np.int64(8)
    assert patterns.longformer(eight, 1) == patterns.longformer(8, 1)
    assert patterns.longnet(np.array([4, 8]), [1, 2]) == patterns.longnet((4, 8), (1, 2))


# --- the package --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [classic, trianglemix], ids=lambda m: m.__name__)
def test_pictures(module: Any) -> None:
    tried = doctest.testmod(module)
    assert tried.attempted > 0
    assert tried.failed == 0


ESTIMATORS = {"block_topk", "flex_prefill", "vertical_slash", "xattention"}  # see test_estimate
# see test_policy
POLICIES = {"LayerPolicy", "minference", "published_triangle_mix", "triangle_mix"}


def test_every_function_is_exported_and_documented(project: Path) -> None:
    public = {name for module in (classic, trianglemix) for name, value in vars(module).items()
              if callable(value) and value.__module__ == module.__name__ and name[0] != "_"}
    assert public | ESTIMATORS | POLICIES == set(patterns.__all__)
    assert {name for name, _, _, _ in CASES} == public
    for name in public:
        text = getattr(patterns, name).__doc__
        assert "Source:" in text and ">>>" in text and "causal=" in text and "token" in text
    page = (project / "docs" / "patterns.md").read_text()
    for name in public | POLICIES:
        assert f"`{name}`" in page or f"`{name}(" in page, name
    for name in (*public, "minference"):
        assert f"[`{name}`](#{name})" in page and f"\n## {name}\n" in page, name


def test_the_folder_is_not_a_package_of_its_own() -> None:
    init = Path(patterns.__file__)
    spec = importlib.util.spec_from_file_location("patterns", init)
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r"import maskdsl\.patterns"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "patterns" not in sys.modules
