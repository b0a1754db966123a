"""MInference's vertical-slash estimate: which columns and distances the last queries look at.

An estimator reads q and k, once and cheaply, and returns the indices of a dynamic mask. Query row
r sits at absolute position Lk - Lq + r. All work is batched over heads and batch, K is never
repeated for grouped heads, nothing of size last x Lk is stored, and nothing waits for the GPU.
"""

from __future__ import annotations

import math

import torch

from maskdsl.errors import (
    AtomArgumentError,
    DeviceError,
    DtypeError,
    HeadCountError,
    HeadDimError,
    MaskTypeError,
    RankError,
    ShapeError,
)
from maskdsl.indices import VSIndices
from maskdsl.inputs import DTYPES, check_scale
from maskdsl.patterns.fused import fused_scores

MIN_VERTICAL, MIN_SLASH = 30, 50  # MInference's code raises smaller sizes to these
CHUNK = 1 << 24  # numbers of one temporary in the chunked path: 64 MiB of float32


def vertical_slash(q: torch.Tensor, k: torch.Tensor, vertical: int = 1000, slash: int = 6096, *,
                   last: int = 64, forced_columns: int = 30, forced_slashes: int = 100,
                   per_kv_head: bool = False, scale: float | None = None) -> VSIndices:
    """The `vertical` columns and `slash` distances p - k that the last queries weigh most.

    q                float[B, Hq, Lq, D]
    k                float[B, Hkv, Lk, D], Lk >= Lq
    vertical, slash  sizes of the two lists, in tokens; at least 30 and 50 as in MInference's
                     code, at most Lk
    last             queries looked at, in tokens
    forced_columns   the first columns, always chosen
    forced_slashes   the smallest distances, always chosen
    per_kv_head      one pair of lists for all query heads of a KV head, from the sum of their
                     scores (our addition: such lists serve a whole group with one load of K)
    scale            of the softmax; default D ** -0.5

    Returns int32 lists [B, Hq or Hkv, size], in no order. Forced entries count towards the size;
    if it is smaller than their number, the first ones are kept (MInference keeps any of them).

    Raises ShapeError and its kinds, DtypeError, DeviceError, ScaleError, AtomArgumentError.

    Source: MInference, arXiv 2407.02490, section 3.2 and algorithm 2; the forced entries and
    least sizes are those of its code.
    """
    check_inputs(q, k)
    check_sizes("vertical_slash", vertical=vertical, slash=slash, forced_columns=forced_columns,
                forced_slashes=forced_slashes)
    columns, distances = vertical_slash_scores(q, k, last, scale)
    if per_kv_head:
        columns, distances = (torch.unflatten(s, 1, (k.shape[1], -1)).sum(2)
                              for s in (columns, distances))
    return VSIndices(select_top(columns, max(vertical, MIN_VERTICAL), forced_columns),
                     select_top(distances, max(slash, MIN_SLASH), forced_slashes))


@torch.no_grad()
def vertical_slash_scores(q: torch.Tensor, k: torch.Tensor, last: int = 64,
                          scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last rows of causal softmax(q k^T) give to each column and to each distance.

    q float[B, Hq, Lq, D], k float[B, Hkv, Lk, D]; `last` in tokens, Lq of them if Lq is smaller.
    Returns two float32[B, Hq, Lk]: entry j of the first is the sum over the rows of column j,
    entry d of the second the sum over the rows at key p - d. Each sums to the number of rows.
    On a GPU both come from two fused passes over K, in the dtype of the inputs with float32
    accumulation; elsewhere from a loop over chunks of K, in float32.

    Source: MInference, arXiv 2407.02490, algorithm 2.
    """
    check_inputs(q, k)
    check_sizes("vertical_slash_scores", least=1, last=last)
    rows = q[:, :, -min(last, q.shape[2]):]
    factor = check_scale(scale, q.shape[3])
    return (fused_scores if q.is_cuda else chunked_scores)(rows, k, factor)


def select_top(scores: torch.Tensor, size: int, forced: int = 0) -> torch.Tensor:
    """int32[..., min(size, n)]: the first `forced` indices, then those of the largest scores.

    scores float[..., n]. The order of the result is not specified.
    """
    length = scores.shape[-1]
    size = min(size, length)
    forced = min(forced, size)
    # Taking the forced prefix out instead of giving it infinite scores leaves no ties among
    # infinities, which top-k breaks as it likes.
    first = torch.arange(forced, dtype=torch.int32, device=scores.device)
    top = scores[..., forced:].topk(size - forced, dim=-1, sorted=False).indices
    return torch.cat((first.expand(*scores.shape[:-1], forced), top.to(torch.int32) + forced), -1)


# --- the chunked path -------------------------------------------------------------------------


def chunked_scores(rows: torch.Tensor, k: torch.Tensor,
                   scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`vertical_slash_scores` with plain torch operations, on any device.

    rows float[B, Hq, n, D]: the last n queries; k float[B, Hkv, Lk, D]; n <= Lk.
    """
    batch, heads, count, _ = rows.shape
    length = k.shape[2]
    grouped = (rows.float() * scale).reshape(batch, k.shape[1], -1, rows.shape[3])
    width = max(128, CHUNK // (batch * heads * count))
    starts = range(0, length, width)
    parts = [masked_logits(grouped, k, count, start, width).logsumexp(-1) for start in starts]
    lse = torch.stack(parts).logsumexp(0).unsqueeze(-1)
    columns, diagonals = [], grouped.new_zeros(batch, heads, length + count - 1)
    for start in starts:
        weights = (masked_logits(grouped, k, count, start, width) - lse).exp_()
        weights = weights.view(batch, heads, count, -1)
        columns.append(weights.sum(2))
        sums = diagonal_sums(weights)
        diagonals[..., start:start + sums.shape[-1]] += sums
    # Entry x of the diagonals is at distance Lk - 1 - x; those past Lk - 1 lie in the future.
    return torch.cat(columns, -1), diagonals[..., :length].flip(-1)


def masked_logits(grouped: torch.Tensor, k: torch.Tensor, count: int, start: int,
                  width: int) -> torch.Tensor:
    """float32[B, Hkv, G * count, chunk]: scaled logits of `width` keys from `start`, causal.

    grouped float32[B, Hkv, G * count, D], already scaled: `count` last rows of G heads.
    """
    keys = k[:, :, start:start + width].float()
    logits = grouped @ keys.transpose(-1, -2)
    first = k.shape[2] - count  # position of the first row
    if start + width > first:
        key = torch.arange(start, start + keys.shape[2], device=k.device)
        row = torch.arange(first, k.shape[2], device=k.device).unsqueeze(-1)
        torch.unflatten(logits, 2, (-1, count)).masked_fill_(key > row, -math.inf)
    return logits


def diagonal_sums(weights: torch.Tensor) -> torch.Tensor:
    """[..., n, m] --> [..., m + n - 1]: entry x is the sum of the weights[r, c] with
    c - r = x - (n - 1).
    """
    rows, width = weights.shape[-2:]
    # With the rows turned over and each padded to n + m, reading n + m - 1 at a time puts row r
    # one column further to the right than row r - 1.
    padded = torch.nn.functional.pad(weights.flip(-2), (0, rows)).flatten(-2)
    return torch.unflatten(padded[..., :rows * (width + rows - 1)], -1, (rows, -1)).sum(-2)


# --- checks -----------------------------------------------------------------------------------


def check_inputs(q: torch.Tensor, k: torch.Tensor) -> None:
    """q [B, Hq, Lq, D] and k [B, Hkv, Lk, D] fit together, with 1 <= Lq <= Lk."""
    for name, t in (("q", q), ("k", k)):
        if not isinstance(t, torch.Tensor):
            raise MaskTypeError(f"{name} of type {type(t).__name__}", "not a torch.Tensor",
                                "a tensor [B, H, L, D]")
        if t.dim() != 4:
            raise RankError(f"{name} {list(t.shape)}", f"{name} has {t.dim()} dimensions, not 4",
                            f"a tensor [B, H, L, D]; {name}.unsqueeze(0) adds a batch of one")
    if q.dtype != k.dtype or q.dtype not in DTYPES:
        raise DtypeError(f"q {q.dtype}, k {k.dtype}", "not one dtype that estimates work in",
                         "both " + " or ".join(str(d) for d in DTYPES))
    if q.device != k.device:
        raise DeviceError(f"q on {q.device}, k on {k.device}", "the devices differ",
                          f"k.to({str(q.device)!r})")
    _check_sizes_fit(q, k)


def _check_sizes_fit(q: torch.Tensor, k: torch.Tensor) -> None:
    wrote = f"q {list(q.shape)}, k {list(k.shape)}"
    if q.shape[0] != k.shape[0]:
        raise ShapeError(wrote, "the batch sizes differ", "equal first dimensions")
    if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise HeadCountError(wrote, f"{q.shape[1]} query heads cannot share {k.shape[1]} "
                             "key/value heads evenly",
                             "a number of query heads that is a multiple of the key/value heads")
    if q.shape[3] != k.shape[3] or not q.shape[3]:
        raise HeadDimError(wrote, f"q has head dimension {q.shape[3]}, k has {k.shape[3]}",
                           "equal head dimensions of at least 1")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ShapeError(wrote, f"{q.shape[2]} queries over {k.shape[2]} keys: an estimate needs "
                         "a query, and a key for each (the last query lines up with the last "
                         "key)", "the keys of the whole prompt so far, and 1 to Lk queries")


def check_sizes(caller: str, least: int = 0, **sizes: int) -> None:
    """Every size is an integer >= least, or an AtomArgumentError."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise AtomArgumentError(f"{caller}({name}={value!r})",
                                    f"{name} must be an integer >= {least}",
                                    f"{caller}({name}={max(least, 64)})")


def check_share(caller: str, name: str, value: float) -> None:
    """A share of attention, 0 < value <= 1, or an AtomArgumentError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise AtomArgumentError(f"{caller}({name}={value!r})",
                                f"{name} is the share of the attention to keep, 0 < {name} <= 1",
                                f"{caller}({name}=0.9)")
