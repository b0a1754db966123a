"""FlashAttention 4 in CuTe (wheel flash-attn-4): native where it can, else mask_mod and lists."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.cases import Case, Pattern
from benchmarks.peers import Peer, Prepared, Tensors, build_twice, turn


def block_lists(live: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(counts, indices) of partial tiles and of full ones: int32[1, 1, M] and int32[1, 1, M, N'].

    live, full: bool[M, N]. Indices ascend; N' is the longest list of its kind, which FA4 allows.
    """
    found: list[torch.Tensor] = []
    for chosen in (live & ~full, full):
        counts = chosen.sum(1, dtype=torch.int32)
        width = max(1, int(counts.max()))
        order = torch.argsort(chosen.logical_not().to(torch.uint8), dim=1, stable=True)
        found += [counts[None, None].contiguous(),
                  order[:, :width].to(torch.int32)[None, None].contiguous()]
    return tuple(found)


def tile_size(dim: int) -> int:
    """The square tile its H100 kernel takes lists for; above 128 its key tiles are no divisor of
    128 queries and the peer is left out of the masks that need lists."""
    return 128 if dim <= 128 else 0


class FlashAttention4(Peer):
    """Dense causal and windows by its own arguments, the rest by mask_mod and block lists.

    On Hopper a key block of the lists must be as wide as the kernel's key tile (128 for head
    dimensions up to 128). The mask's sizes are compiled in: another (S, W, N) compiles again.
    """

    key, name = "fa4", "FlashAttention 4"
    package, module = "flash-attn-4", "flash_attn.cute"

    def expresses(self, pattern: Pattern) -> bool:
        return True

    def prepare(self, case: Case, tensors: Tensors, deadline: float) -> Prepared | None:
        pattern = case.pattern
        if (pattern.sink or pattern.last) and not tile_size(case.dim):
            return None
        return self.ready(case, tensors, deadline)

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        from flash_attn.cute import flash_attn_func

        q, k, v = turn(tensors)
        pattern = case.pattern
        if not pattern.sink and not pattern.last:
            window = (None, None) if pattern.window is None else (pattern.window - 1, 0)
            return Prepared(lambda: flash_attn_func(q, k, v, causal=True, window_size=window),
                            blhd=True, settings="causal and window_size")
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        from benchmarks.peer_fa4_mask import union_mask

        size = tile_size(case.dim)

        def build() -> Any:
            lists = block_lists(*pattern.tiles(case.length, size, q.device))
            return BlockSparseTensorsTorch(*lists, block_size=(size, size))

        lists, ms, first = build_twice(build)
        mod = union_mask(pattern.sink, pattern.window, pattern.last)
        visited = int(lists.mask_block_cnt.sum() + lists.full_block_cnt.sum())
        return Prepared(
            lambda: flash_attn_func(q, k, v, mask_mod=mod, block_sparse_tensors=lists), blhd=True,
            mask_ms=ms, mask_first_s=first, visited=visited * size * size * case.heads,
            settings="mask_mod and block lists")
