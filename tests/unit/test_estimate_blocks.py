"""Each estimate of blocks against its paper's definition, head by head and as plainly as can be.

Without a GPU the fused kernels run in Triton's interpreter; with one, everything runs there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from estimates import DEVICE, SIZES, Sizes, Tensor, each_head, make, paper_scores

import maskdsl
from maskdsl import Blocks
from maskdsl.patterns import estimate_blocks, fused


def last_key(i: int, block: int, q_len: int, k_len: int) -> int:
    """The position of the last query in block row i."""
    return k_len - q_len + min((i + 1) * block, q_len) - 1


def means(x: Tensor, block: int) -> Tensor:
    return torch.stack([part.mean(0) for part in x.split(block)])


def block_count(length: int, block: int) -> int:
    return math.ceil(length / block)


def paper_topk(q: Tensor, k: Tensor, topk: int, block: int) -> Tensor:
    """bool[Mb, Nb] of one head."""
    scores = means(q, block) @ means(k, block).T
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores):
        seen = last_key(i, block, len(q), len(k)) // block + 1
        mask[i, row[:seen].topk(min(topk, seen)).indices] = True
    return mask


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("topk", [1, 3, 50])
def test_block_topk(sizes: Sizes, topk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_blocks, "CHUNK", 1)  # a block row at a time
    q, k = make(sizes)
    found = estimate_blocks.block_topk(q, k, topk, block=32)
    assert (found.q_block, found.kv_block) == (32, 32)
    assert found.index.dtype == torch.int32
    wanted = each_head(q, k, lambda q, k: paper_topk(q, k, topk, 32))
    assert torch.equal(found.table(*wanted.shape[2:]).cpu(), wanted)
    assert torch.equal((found.index >= 0).sum(-1).cpu(), wanted.sum(-1))  # sentinels, no doubles


def paper_antidiagonal(q: Tensor, k: Tensor, stride: int, block: int, scale: float) -> Tensor:
    """float64[Mb, Nb] of one head, antidiagonal by antidiagonal."""
    rows, columns = block_count(len(q), block), block_count(len(k), block)
    logits = torch.zeros(rows * block, columns * block, dtype=torch.float64)
    logits[:len(q), :len(k)] = scale * q @ k.T
    sums = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(0, len(q), stride):
        final = min(len(k) - len(q) + i + stride, len(k)) - 1
        starts = range(0, final + 1, stride)
        cells = [sum(logits[i + stride - 1 - r, j + r] for r in range(stride)) / stride
                 for j in starts]
        for j, weight in zip(starts, torch.tensor(cells).softmax(0), strict=True):
            sums[i // block, j // block] += weight
    return sums


def paper_cover(scores: Tensor, q_len: int, k_len: int, block: int, threshold: float) -> Tensor:
    """bool[Mb, Nb] of one head: blocks are added one by one until the threshold is reached."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for i, row in enumerate(scores):
        mask[i, 0] = True
        first = (k_len - q_len + i * block) // block
        mask[i, first:last_key(i, block, q_len, k_len) // block + 1] = True
        for j in row.argsort(descending=True).tolist():
            if not mask[i, j] and row[mask[i]].sum() < threshold * row.sum() and row[j] > 0:
                mask[i, j] = True
    return mask


Antidiagonal = Callable[[Tensor, Tensor, int, int, float], Tensor]
XATTENTION = [(SIZES[0], 8, 32), (SIZES[1], 8, 64), (SIZES[1], 4, 32), (SIZES[2], 8, 32),
              (SIZES[2], 16, 32), (SIZES[3], 16, 64), (SIZES[4], 8, 16), (SIZES[5], 8, 16)]


@pytest.mark.parametrize("run", [estimate_blocks.antidiagonal_scores, fused.fused_antidiagonal])
@pytest.mark.parametrize(("sizes", "stride", "block"), XATTENTION)
def test_antidiagonal_scores(run: Antidiagonal, sizes: Sizes, stride: int, block: int,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_blocks, "CHUNK", 1)
    monkeypatch.setattr(fused, "PARTS", 5000)
    q, k = make(sizes, 8.0)
    wanted = each_head(q, k, lambda q, k: paper_antidiagonal(q, k, stride, block, 0.3))
    torch.testing.assert_close(run(q, k, stride, block, 0.3).cpu().double(), wanted, rtol=1e-3,
                               atol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.0])
@pytest.mark.parametrize(("sizes", "stride", "block"), [*XATTENTION, (SIZES[1], 8, 24)])
def test_xattention(sizes: Sizes, stride: int, block: int, threshold: float) -> None:
    q, k = make(sizes, 8.0)
    found = estimate_blocks.xattention(q, k, stride=stride, threshold=threshold, block=block)

    def one(q: Tensor, k: Tensor) -> Tensor:
        scores = paper_antidiagonal(q, k, stride, block, sizes[5]**-0.5)
        return paper_cover(scores, sizes[3], sizes[4], block, threshold)

    if threshold < 1:
        assert torch.equal(found.index.cpu(), each_head(q, k, one))
    else:  # rounding decides which of the smallest blocks are there: all that weigh anything are
        scores = each_head(q, k, lambda q, k: paper_antidiagonal(q, k, stride, block,
                                                                 sizes[5]**-0.5))
        assert found.index.cpu()[scores > 1e-4].all()
        assert not (found.index.cpu() & (scores == 0))[:, :, :, 1:].any()


def smooth(sizes: Sizes, block: int) -> tuple[Tensor, Tensor]:
    """As `make`, but each block of k holds one key in KV head 0, whose heads have one query."""
    q, k = make(sizes, 3.0, seed=1)
    k[:, :1] = k[:, :1, ::block].repeat_interleave(block, 2)[:, :, :k.shape[2]]
    group = q.shape[1] // k.shape[1]
    q[:, :group] = q[:, :group, :1] + 0.05 * q[:, :group]
    return q, k


def paper_flex(q: Tensor, k: Tensor, gamma: float, tau: float, least: int, most: int,
               block: int) -> tuple[Tensor, bool]:
    """(bool[Mb, Nb], query-aware) of one head, with sorted lists."""
    scale, n = len(q[0])**-0.5, block_count(len(k), block)
    rows = min(block, len(q))
    shares = paper_scores(q, k, rows, scale) / rows
    vertical, slash = (torch.stack([part.sum() for part in s.split(block)]) for s in shares)
    guess = (scale * means(k, block) @ q[-rows:].mean(0)).softmax(0)
    middle = (guess + vertical) / 2
    aware = sum(0.5 * (p * (p / middle).log()).nansum() for p in (guess, vertical))**0.5 < tau
    counts = []
    for s in shares:
        tokens = int((s.sort(descending=True).values.cumsum(0) <= gamma).sum()) + 1
        counts.append(least if aware else max(least, min(most, tokens // block + 1)))
    vertical[0] = slash[0] = math.inf
    columns = vertical.topk(min(counts[0], n)).indices.tolist()
    distances = slash.topk(min(counts[1], n)).indices.tolist()
    ends = [last_key(i, block, len(q), len(k)) for i in range(block_count(len(q), block))]
    mask = torch.zeros(len(ends), n, dtype=torch.bool)
    seen = torch.arange(n) <= torch.tensor(ends)[:, None] // block
    for i, end in enumerate(ends):
        start = len(k) - len(q) + i * block
        for j in range(n):
            near = end // block - j in distances or start // block - j in distances
            mask[i, j] = near or j in columns
    if aware:
        attention = scale * means(q, block) @ means(k, block).T
        attention = attention.masked_fill(~seen, -math.inf).softmax(-1).flatten()
        values, order = attention.sort(descending=True)
        mask.view(-1)[order[values.cumsum(0) <= gamma * len(ends)]] = True
    return mask & seen, bool(aware)


@pytest.mark.parametrize("sizes", [(2, 4, 2, 300, 300, 24), (1, 6, 2, 101, 367, 40),
                                   (1, 2, 2, 128, 384, 16), (1, 4, 2, 5, 203, 16)])
@pytest.mark.parametrize(("gamma", "least", "most"), [(0.9, 1, None), (0.6, 40, None),
                                                      (0.95, 33, 64)])
def test_flex_prefill(sizes: Sizes, gamma: float, least: int, most: int | None) -> None:
    block, tau = 32, 0.13
    q, k = smooth(sizes, block)
    found = estimate_blocks.flex_prefill(q, k, gamma=gamma, tau=tau, min_budget=least,
                                         max_budget=most, block=block)
    kinds = []

    def one(q: Tensor, k: Tensor) -> Tensor:
        most_blocks = block_count(most or len(k), block)
        mask, aware = paper_flex(q, k, gamma, tau, block_count(least, block), most_blocks, block)
        kinds.append(aware)
        return mask

    assert torch.equal(found.index.cpu(), each_head(q, k, one))
    assert any(kinds) and not all(kinds)  # both patterns were needed
    assert found.index[..., 0].all()
    assert found.index[:, :, -1, (sizes[4] - 1) // block].all()


def test_flex_prefill_of_short_prompts_is_causal() -> None:
    q, k = make((1, 2, 1, 128, 128, 16))
    found = estimate_blocks.flex_prefill(q, k, gamma=0.1, block=64)
    assert found.index.tolist() == [[[[True, False], [True, True]]] * 2]
    assert estimate_blocks.flex_prefill(q, k, gamma=0.1, min_budget=128, block=32).index.sum() == 20


def sorted_cut(scores: Tensor, target: float) -> Tensor:
    values = scores.double().sort(dim=-1, descending=True).values
    return (values.cumsum(-1) <= target).sum(-1)


@pytest.mark.parametrize("cut", [estimate_blocks.prefix_cut, fused.fused_prefix_cut])
@pytest.mark.parametrize("target", [0.05, 0.5, 0.999, 2.0])
def test_prefix_cut(cut: Callable[[Tensor, float], Tensor], target: float) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = (torch.randn(2, 3, 9000, generator=generator) * 3).softmax(-1).to(DEVICE)
    found = cut(scores, target)
    assert found.shape == (2, 3, 1)
    assert torch.equal((scores >= found).sum(-1), sorted_cut(scores, target))


@pytest.mark.parametrize("cut", [estimate_blocks.prefix_cut, fused.fused_prefix_cut])
def test_prefix_cut_of_one_large_score(cut: Callable[[Tensor, float], Tensor]) -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.25, 0.5]], device=DEVICE)
    assert (scores >= cut(scores, 0.9)).tolist() == [[False] * 3, [False, False, True]]
    assert (scores >= cut(scores, 1.0)).tolist() == [[True] * 3] * 2


@pytest.mark.parametrize("name", ["block_topk", "xattention", "flex_prefill"])
def test_all_blocks_are_causal_attention(name: str) -> None:
    q, k = make((1, 4, 2, 101, 367, 16), 0.1)
    options: dict[str, Any] = {"block_topk": {"topk": 99}, "xattention": {"threshold": 1.0},
                               "flex_prefill": {"min_budget": 999}}[name]
    found = getattr(estimate_blocks, name)(q, k, block=32, **options)
    full = maskdsl.compile(maskdsl.Full(), backend="torch")(q, k, k)
    sparse = maskdsl.compile(Blocks("idx", q_block=32, kv_block=32), backend="torch")
    torch.testing.assert_close(sparse(q, k, k, idx=found), full)
