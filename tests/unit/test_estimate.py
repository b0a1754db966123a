"""The vertical-slash estimate against its definition, head by head and as plainly as can be.

Without a GPU the fused kernels run in Triton's interpreter; with one, everything runs there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from estimates import SIZES, Sizes, Tensor, each_head, make, paper_scores, sets

import maskdsl
from maskdsl import VerticalSlash
from maskdsl.errors import (
    AtomArgumentError,
    DtypeError,
    HeadCountError,
    HeadDimError,
    MaskDSLError,
    MaskTypeError,
    RankError,
    ScaleError,
    ShapeError,
)
from maskdsl.patterns import estimate, estimate_blocks, fused

Scores = Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor]]


def run_chunked(q: Tensor, k: Tensor, last: int, scale: float) -> tuple[Tensor, Tensor]:
    return estimate.chunked_scores(q[:, :, -last:], k, scale)


def run_fused(q: Tensor, k: Tensor, last: int, scale: float) -> tuple[Tensor, Tensor]:
    return fused.fused_scores(q[:, :, -last:], k, scale)


@pytest.mark.parametrize("run", [run_chunked, run_fused, estimate.vertical_slash_scores])
@pytest.mark.parametrize(("sizes", "last"), [(s, 64) for s in SIZES] + [
    (SIZES[1], 1), (SIZES[1], 100), (SIZES[1], 128), (SIZES[2], 3), (SIZES[3], 7)])
def test_scores(run: Scores, sizes: Sizes, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "CHUNK", 1)  # pieces of 128 keys
    q, k = make(sizes)
    wanted = each_head(q, k, lambda q, k: paper_scores(q, k, last, 0.3))
    for ours, theirs in zip(run(q, k, last, 0.3), wanted.unbind(2), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [run_chunked, run_fused])
def test_scores_of_half_precision_and_of_views(run: Scores) -> None:
    q, k = make((2, 4, 2, 90, 170, 24), dtype=torch.float16)
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))  # [B, L, H, D]
    wanted = each_head(q, k, lambda q, k: paper_scores(q, k, 64, 0.2))
    for ours, theirs in zip(run(q, k, 64, 0.2), wanted.unbind(2), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-3, atol=1e-4)


def test_default_scale() -> None:
    q, k = make(SIZES[1])
    for ours, theirs in zip(estimate.vertical_slash_scores(q, k),
                            estimate.vertical_slash_scores(q, k, 64, 24**-0.5), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("forced", [0, 3, 10, 40])
@pytest.mark.parametrize("size", [0, 1, 10, 29, 30, 50])
def test_select_top(size: int, forced: int) -> None:
    scores = torch.randn(2, 3, 30)
    found = estimate.select_top(scores, size, forced)
    assert found.dtype == torch.int32
    for row, chosen in zip(scores.flatten(0, 1).tolist(), sets(found), strict=True):
        order = sorted(range(30), key=lambda i: (i if i < forced else 1000 - row[i]))
        assert chosen == set(order[:size])


@pytest.mark.parametrize("per_kv_head", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_vertical_slash(sizes: Sizes, per_kv_head: bool) -> None:
    q, k = make(sizes)
    found = estimate.vertical_slash(q, k, 40, 120, per_kv_head=per_kv_head)
    scores = each_head(q, k, lambda q, k: paper_scores(q, k, 64, sizes[5]**-0.5))
    if per_kv_head:
        scores = scores.unflatten(1, (sizes[2], -1)).sum(2)
    for index, size, forced, row in ((found.vertical, 40, 30, 0), (found.slash, 120, 100, 1)):
        assert index.shape == (*scores.shape[:2], min(size, sizes[4]))
        scores[:, :, row, :forced] = math.inf  # as MInference does; never more of them than size
        assert sets(index) == sets(scores[:, :, row].topk(index.shape[-1]).indices)


def test_vertical_slash_sizes_are_clipped_as_in_minference() -> None:
    q, k = make(SIZES[1])
    found = estimate.vertical_slash(q, k, 1, 1)
    assert found.vertical.shape[-1] == 30
    assert found.slash.shape[-1] == 50
    assert sets(found.vertical) == [set(range(30))] * 8
    assert sets(found.slash) == [set(range(50))] * 8  # the nearest of the hundred forced ones


def test_vertical_slash_of_everything_is_causal_attention() -> None:
    q, k = make(SIZES[2])
    full = maskdsl.compile(maskdsl.Full(), backend="torch")(q, k, k)
    sparse = maskdsl.compile(VerticalSlash("vs"), backend="torch")
    torch.testing.assert_close(sparse(q, k, k, vs=estimate.vertical_slash(q, k)), full)


# --- on a GPU only ----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("run", [
    estimate.vertical_slash, estimate_blocks.flex_prefill, estimate_blocks.xattention,
    lambda q, k: estimate_blocks.block_topk(q, k, 3)])
def test_nothing_waits_for_the_gpu(run: Callable[..., object]) -> None:
    q, k = make((1, 4, 2, 1000, 1500, 64), dtype=torch.bfloat16)
    run(q, k)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        run(q, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """Keys whose last row lies more than 2 ** 31 numbers behind the first."""
    length = 140_000
    cache = torch.empty(1, length, 128, 128, dtype=torch.float16, device="cuda")
    q, k = make((1, 2, 1, 640, length, 128), dtype=torch.float16)
    cache[:, :, :1] = k.transpose(1, 2)
    far = cache[:, :, :1].transpose(1, 2)
    assert (length - 1) * far.stride(2) > 1 << 31
    for ours, theirs in zip(estimate.vertical_slash_scores(q, far),
                            estimate.vertical_slash_scores(q, k), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(fused.fused_antidiagonal(q, far, 16, 128, 0.1),
                               fused.fused_antidiagonal(q, k, 16, 128, 0.1))


# --- mistakes ---------------------------------------------------------------------------------

Q, K = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
ESTIMATES: list[Callable[..., object]] = [
    estimate.vertical_slash, estimate.vertical_slash_scores, estimate_blocks.flex_prefill,
    estimate_blocks.xattention, lambda q, k: estimate_blocks.block_topk(q, k, 2)]


@pytest.mark.parametrize("run", ESTIMATES)
@pytest.mark.parametrize(("q", "k", "error"), [
    (Q, [1], MaskTypeError), (Q[0], K, RankError), (Q, K.half(), DtypeError),
    (Q.double(), K.double(), DtypeError), (Q, K[:0], ShapeError), (Q[:, :3], K, HeadCountError),
    (Q, K[:, :0], HeadCountError), (Q[..., :8], K, HeadDimError), (Q, K[:, :, :7], ShapeError),
    (Q[:, :, :0], K, ShapeError)])
def test_wrong_tensors(run: Callable[..., object], q: Any, k: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(q, k)


@pytest.mark.parametrize(("run", "error"), [
    (lambda: estimate.vertical_slash(Q, K, -1), AtomArgumentError),
    (lambda: estimate.vertical_slash(Q, K, slash=2.5), AtomArgumentError),  # type: ignore[arg-type]
    (lambda: estimate.vertical_slash(Q, K, forced_columns=-1), AtomArgumentError),
    (lambda: estimate.vertical_slash(Q, K, forced_slashes=True), AtomArgumentError),
    (lambda: estimate.vertical_slash(Q, K, last=0), AtomArgumentError),
    (lambda: estimate.vertical_slash(Q, K, scale=math.nan), ScaleError),
    (lambda: estimate_blocks.block_topk(Q, K, 0), AtomArgumentError),
    (lambda: estimate_blocks.block_topk(Q, K, 1, block=0), AtomArgumentError),
    (lambda: estimate_blocks.xattention(Q, K, stride=0), AtomArgumentError),
    (lambda: estimate_blocks.xattention(Q, K, stride=24), AtomArgumentError),
    (lambda: estimate_blocks.xattention(Q, K, threshold=0.0), AtomArgumentError),
    (lambda: estimate_blocks.xattention(Q, K, scale=-1.0), ScaleError),
    (lambda: estimate_blocks.flex_prefill(Q, K, gamma=1.5), AtomArgumentError),
    (lambda: estimate_blocks.flex_prefill(Q, K, tau=-0.1), AtomArgumentError),
    (lambda: estimate_blocks.flex_prefill(Q, K, min_budget=0), AtomArgumentError),
    (lambda: estimate_blocks.flex_prefill(Q, K, max_budget=0), AtomArgumentError)])
def test_wrong_arguments(run: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        run()
    assert isinstance(raised.value, MaskDSLError)
    assert raised.value.instead
