"""Estimates that choose blocks: FlexPrefill, XAttention, and MInference's block-sparse top-k.

Block row i holds query rows [i * block, (i + 1) * block) of the call, block column j keys
[j * block, (j + 1) * block). Where the call starts at a multiple of `block` the diagonal is one
block a row; elsewhere it is the two blocks that the positions of the row fall into.

Results, and a few temporaries, hold one number for each head and pair of blocks; what is larger
than that is worked on in pieces of bounded size.
"""

from __future__ import annotations

import math

import torch

from maskdsl.errors import AtomArgumentError
from maskdsl.indices import BlockIndices
from maskdsl.inputs import check_scale
from maskdsl.patterns.estimate import (
    CHUNK,
    check_inputs,
    check_share,
    check_sizes,
    vertical_slash_scores,
)
from maskdsl.patterns.fused import (
    TWO,
    can_fuse_antidiagonal,
    fused_antidiagonal,
    fused_prefix_cut,
)

Tensor = torch.Tensor


# --- MInference's block-sparse top-k ----------------------------------------------------------


@torch.no_grad()
def block_topk(q: Tensor, k: Tensor, topk: int, *, block: int = 64) -> BlockIndices:
    """For every block of queries the `topk` key blocks with the largest mean logit.

    q float[B, Hq, Lq, D], k float[B, Hkv, Lk, D], Lk >= Lq; `block` in tokens, for both sides.
    Logits of mean-pooled q and k, causal at block level; no block is forced. Returns lists
    int32[B, Hq, Mb, min(topk, Nb)], -1 behind the blocks of a row that sees fewer.

    MInference's code pools a ragged last block as if it were filled with zeros; here it is the
    mean of the tokens that are there.

    Raises ShapeError and its kinds, DtypeError, DeviceError, AtomArgumentError.

    Source: MInference, arXiv 2407.02490, section 3.2 and algorithm 3.
    """
    check_inputs(q, k)
    check_sizes("block_topk", least=1, topk=topk, block=block)
    return BlockIndices.from_topk(top_blocks(q, k, topk, block), block, block)


def top_blocks(q: Tensor, k: Tensor, topk: int, block: int) -> Tensor:
    """int32[B, Hq, Mb, min(topk, Nb)]: the lists of `block_topk`."""
    queries, keys = pool(q, block), pool(k, block)
    _, last = diagonal(q.shape[2], k.shape[2], block, q.device)
    rows, columns = queries.shape[2], keys.shape[2]
    column = torch.arange(columns, device=q.device)
    step = max(1, CHUNK // (q.shape[0] * q.shape[1] * columns))
    lists = []
    for start in range(0, rows, step):
        scores = grouped_product(queries[:, :, start:start + step], keys)
        scores.masked_fill_(column > last[start:start + step, None], -math.inf)
        best = scores.topk(min(topk, columns), dim=-1, sorted=False)
        lists.append(torch.where(best.values > -math.inf, best.indices, -1).to(torch.int32))
    return torch.cat(lists, 2)


# --- XAttention -------------------------------------------------------------------------------


@torch.no_grad()
def xattention(q: Tensor, k: Tensor, *, stride: int = 8, threshold: float = 0.9,
               block: int = 128, scale: float | None = None) -> BlockIndices:
    """The key blocks that hold `threshold` of each query block's antidiagonal attention.

    q          float[B, Hq, Lq, D]
    k          float[B, Hkv, Lk, D], Lk >= Lq
    stride     in tokens: one product stands for stride x stride pairs; divides `block`
    threshold  share of the estimated attention that the chosen blocks hold, 0 < threshold <= 1
    block      in tokens, for queries and keys
    scale      of the softmax; default D ** -0.5

    Returns bool[B, Hq, Mb, Nb] as BlockIndices: key block 0, the diagonal, and the fewest other
    blocks that reach the threshold together with them.

    Raises ShapeError and its kinds, DtypeError, DeviceError, ScaleError, AtomArgumentError.

    Source: XAttention, arXiv 2503.16428, section 2 and algorithm 1; block 0 and the diagonal are
    forced by its code.
    """
    check_inputs(q, k)
    check_sizes("xattention", least=1, stride=stride, block=block)
    check_share("xattention", "threshold", threshold)
    if block % stride:
        raise AtomArgumentError(f"xattention(stride={stride}, block={block})",
                                "the stride does not divide the block",
                                f"xattention(stride={math.gcd(stride, block)}, block={block})")
    fuse = q.is_cuda and can_fuse_antidiagonal(stride, block)
    estimate = fused_antidiagonal if fuse else antidiagonal_scores
    scores = estimate(q, k, stride, block, check_scale(scale, q.shape[3]))
    first, last = diagonal(q.shape[2], k.shape[2], block, q.device)
    column = torch.arange(scores.shape[3], device=q.device)
    forced = (column == 0) | ((column >= first[:, None]) & (column <= last[:, None]))
    return BlockIndices.from_mask(cover_rows(scores, forced, threshold), block, block)


def antidiagonal_scores(q: Tensor, k: Tensor, stride: int, block: int, scale: float) -> Tensor:
    """float32[B, Hq, Mb, Nb]: attention between groups of `stride` tokens, summed over blocks.

    The logit of query group I and key group J is the mean over r of the scaled products of query
    I * stride + stride - 1 - r and key J * stride + r: the antidiagonal of their square. Softmax
    over the groups that start at or before the last position of the query group.
    """
    batch, heads, q_len, _ = q.shape
    k_len, per = k.shape[2], block // stride
    rows, columns = -(-q_len // block), -(-k_len // block)
    offset = k_len - q_len
    dtype = q.dtype if q.is_cuda else torch.float32  # CPUs multiply halves slowly
    keys = torch.unflatten(fill(k, block).to(dtype), 2, (-1, stride)).flatten(3)
    scores = torch.zeros(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    step = max(1, CHUNK // (batch * heads * per * per * columns))
    for start in range(0, rows, step):
        queries = fill(q[:, :, start * block:(start + step) * block], block).to(dtype)
        queries = torch.unflatten(queries, 2, (-1, stride)).flip(3).flatten(3)
        group = start * per + torch.arange(queries.shape[2], device=q.device)
        end = min(offset + (start + step) * block, k_len)  # no later key is visible
        seen = -(-end // block)
        logits = grouped_product(queries, keys[:, :, :seen * per]).float() * (scale / stride)
        ahead = (offset + start * block) // stride  # key groups before it are seen by every row
        key = stride * torch.arange(ahead, seen * per, device=q.device)
        final = (offset + group * stride + stride - 1).clamp(max=k_len - 1)
        logits[..., ahead:].masked_fill_(key > final[:, None], -math.inf)
        sums = torch.unflatten(logits.softmax(-1), 3, (seen, per)).sum(-1)
        sums = sums * (group * stride < q_len)[:, None]  # groups of padding alone count nothing
        scores[:, :, start:start + step, :seen] = torch.unflatten(sums, 2, (-1, per)).sum(3)
    return scores


def cover_rows(scores: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """bool[..., n]: `forced`, and the fewest others that reach `threshold` of the sum with it.

    scores float32[..., n] >= 0; forced bool, broadcastable to it. Larger scores come first, and
    scores of 0 not at all.
    """
    kept = torch.where(forced, scores, 0).sum(-1, keepdim=True)
    wanted = threshold * scores.sum(-1, keepdim=True)
    rest, order = scores.masked_fill(forced, 0).sort(dim=-1, descending=True)
    before = kept + rest.cumsum(-1) - rest
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, order, (before < wanted) & (rest > 0))
    return chosen | forced


# --- FlexPrefill ------------------------------------------------------------------------------


@torch.no_grad()
def flex_prefill(q: Tensor, k: Tensor, *, gamma: float = 0.9, tau: float = 0.1,
                 min_budget: int = 1, max_budget: int | None = None, block: int = 128,
                 scale: float | None = None) -> BlockIndices:
    """Blocks that hold a share gamma of the attention, by the pattern that fits each head.

    q                       float[B, Hq, Lq, D]
    k                       float[B, Hkv, Lk, D], Lk >= Lq
    gamma                   share of the attention to hold, 0 < gamma <= 1
    tau                     a head whose pooled estimate is closer to its true block attention than
                            this (square root of the Jensen-Shannon divergence, 0 to 0.83) is
                            query-aware; 0 makes every head vertical-slash
    min_budget, max_budget  bounds for the number of columns and of diagonals in tokens, rounded up
                            to blocks; None = no bound
    block                   in tokens, for queries and keys; also the number of last queries that
                            are looked at
    scale                   of the softmax; default D ** -0.5

    Returns bool[B, Hq, Mb, Nb] as BlockIndices. Vertical-slash heads: the best columns and
    diagonals of blocks, as many as gamma needs tokens. Query-aware heads: the blocks of largest
    pooled attention that together hold at most gamma of it, over all rows. Column 0 and the
    diagonal always. Up to 2 * block keys, everything causal.

    Both kinds are worked out for all heads, since asking which are needed would wait for the GPU.

    Raises ShapeError and its kinds, DtypeError, DeviceError, ScaleError, AtomArgumentError.

    Source: FlexPrefill, arXiv 2502.20766, algorithms 1 to 4, in the form of its code. That code
    pools distances of a ragged length from the far end; here they are pooled from distance 0.
    """
    check_inputs(q, k)
    check_sizes("flex_prefill", least=1, min_budget=min_budget, block=block,
                max_budget=min_budget if max_budget is None else max_budget)
    check_share("flex_prefill", "gamma", gamma)
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not tau >= 0:
        raise AtomArgumentError(f"flex_prefill(tau={tau!r})", "tau must be a number >= 0",
                                "flex_prefill(tau=0.1)")
    most = k.shape[2] if max_budget is None else max(min_budget, max_budget)
    mask = flex_prefill_mask(q, k, gamma, tau, (-(-min_budget // block), -(-most // block)), block,
                             check_scale(scale, q.shape[3]))
    return BlockIndices.from_mask(mask, block, block)


def flex_prefill_mask(q: Tensor, k: Tensor, gamma: float, tau: float, budget: tuple[int, int],
                      block: int, scale: float) -> Tensor:
    """bool[B, Hq, Mb, Nb] of `flex_prefill`; budget: least and most blocks."""
    edges = diagonal(q.shape[2], k.shape[2], block, q.device)
    column = torch.arange(-(-k.shape[2] // block), device=q.device)
    causal = column <= edges[1][:, None]
    if k.shape[2] <= block * max(2, budget[0]):
        return causal.expand(q.shape[0], q.shape[1], -1, -1)
    vertical, slash = vertical_slash_scores(q, k, block, scale)
    rows = min(block, q.shape[2])
    shares = torch.stack((vertical, slash)) / rows  # each sums to 1
    filled = torch.nn.functional.pad(shares, (0, -shares.shape[-1] % block))
    blocks = torch.unflatten(filled, -1, (-1, block)).sum(-1)
    keys = pool(k, block)
    mean_query = q[:, :, -rows:].mean(2, keepdim=True, dtype=torch.float32)
    guess = grouped_product(mean_query * scale, keys).softmax(-1).squeeze(2)
    aware = divergence(guess, blocks[0]) < tau
    # The code counts the tokens that a share needs, and takes as many blocks as would hold them.
    tokens = (shares >= prefix_cut(shares, gamma)).sum(-1) + 1
    counts = (tokens // block + 1).clamp(*budget).masked_fill(aware, budget[0])
    columns, distances = top_with_first(blocks, counts)
    structured = columns.unsqueeze(2) | along_diagonals(distances, edges)
    attention = pooled_attention(pool(q, block) * scale, keys, causal)
    flat = attention.flatten(2)
    estimated: Tensor = (flat >= prefix_cut(flat, gamma * attention.shape[2])).view_as(attention)
    mask: Tensor = (structured | (aware[..., None, None] & estimated)) & causal
    return mask


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) of [..., n] and [..., n].

    Source: FlexPrefill, arXiv 2502.20766, section 3.1.
    """
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    # xlogy, not a product: shares that underflow to 0 would make it NaN.
    total: Tensor = torch.xlogy(p, p / middle).sum(-1) + torch.xlogy(q, q / middle).sum(-1)
    return (total / 2).clamp(min=0).sqrt()


def prefix_cut(scores: Tensor, target: float) -> Tensor:
    """float32[..., 1]: the least x such that the scores >= x sum to `target` or less.

    scores float32[..., n], 0 <= score < 2. Taking those scores is taking the longest prefix of
    the sorted list within the target (equal scores together), but nothing is sorted: a GPU sorts
    a million numbers a head more slowly than it adds them up thirty times.
    """
    if scores.is_cuda:
        return fused_prefix_cut(scores, target)
    # Floats >= 0 are ordered as their bits are, so bisecting the bits is exact.
    low = torch.full((*scores.shape[:-1], 1), -1, dtype=torch.int32, device=scores.device)
    high = torch.full_like(low, TWO)  # nothing reaches it
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        cut = middle.view(torch.float32)
        fits = torch.where(scores >= cut, scores, 0).sum(-1, keepdim=True) <= target
        high = torch.where(fits, middle, high)
        low = torch.where(fits, low, middle)
    return high.view(torch.float32)


def top_with_first(scores: Tensor, counts: Tensor) -> Tensor:
    """bool[..., n]: the `counts` largest of scores [..., n], where entry 0 goes first."""
    order = torch.cat((torch.full_like(scores[..., :1], math.inf), scores[..., 1:]), -1)
    order = order.argsort(dim=-1, descending=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < counts.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, chosen)


def along_diagonals(distances: Tensor, edges: tuple[Tensor, Tensor]) -> Tensor:
    """bool[B, H, Nb], chosen distances in blocks --> bool[B, H, Mb, Nb], counted from both edges
    of each row's diagonal (which are one where rows and columns of blocks line up).
    """
    column = torch.arange(distances.shape[-1], device=distances.device)
    result = torch.zeros((), dtype=torch.bool, device=distances.device)
    for edge in edges:
        distance = edge[:, None] - column
        result = result | (distances[..., distance.clamp(min=0)] & (distance >= 0))
    return result


def pooled_attention(queries: Tensor, keys: Tensor, causal: Tensor) -> Tensor:
    """float32[B, Hq, Mb, Nb]: softmax over the visible blocks of pooled, scaled logits."""
    return grouped_product(queries, keys).masked_fill_(~causal, -math.inf).softmax(-1)


# --- pieces of all three ----------------------------------------------------------------------


def pool(x: Tensor, block: int) -> Tensor:
    """[B, H, L, D] --> float32[B, H, ceil(L / block), D], the mean of the tokens of each block."""
    whole = x.shape[2] // block * block
    tokens = torch.unflatten(x[:, :, :whole], 2, (whole // block, block))
    parts = [tokens.mean(3, dtype=torch.float32)]
    if whole < x.shape[2]:
        parts.append(x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2)


def fill(x: Tensor, block: int) -> Tensor:
    """Zeros behind dimension 2 of [B, H, L, D] up to a multiple of `block`."""
    missing = -x.shape[2] % block
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def grouped_product(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, Hq, M, D] and [B, Hkv, N, D] --> [B, Hq, M, N], without repeating the keys."""
    batch, heads, rows, dim = queries.shape
    packed = queries.reshape(batch, keys.shape[1], -1, dim)
    return (packed @ keys.transpose(-1, -2)).view(batch, heads, rows, -1)


def diagonal(q_len: int, k_len: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64[Mb] twice: the key blocks of the first and of the last position of each block row."""
    start = k_len - q_len + block * torch.arange(-(-q_len // block), device=device)
    return start // block, (start + block - 1).clamp(max=k_len - 1) // block
