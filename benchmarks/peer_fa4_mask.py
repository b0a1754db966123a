"""FlashAttention 4's mask function. It reads the source of the function, so that must be a file."""

from typing import Any

import cutlass
from cutlass import cute
from flash_attn.cute import utils

# No `from __future__ import annotations`: CuTe reads the annotations of a jitted function.

MADE: dict[tuple[int, int, int], Any] = {}


def union_mask(sink: int, window: int, last: int) -> Any:
    """causal & (k < sink | p - k < window | p >= L - last) as a mask_mod; sizes compiled in."""
    if (sink, window, last) in MADE:  # the same object again, so that its compiled kernel is found
        return MADE[sink, window, last]

    @cute.jit
    def keep(
        batch: cute.TensorSSA,
        head: cute.TensorSSA,
        m_idx: cute.TensorSSA,
        n_idx: cute.TensorSSA,
        seqlen_info,
        aux_tensors,
    ) -> cute.TensorSSA:
        sink_ssa = utils.scalar_to_ssa(sink, cutlass.Int32)
        window_ssa = utils.scalar_to_ssa(window, cutlass.Int32)
        first_last = utils.scalar_to_ssa(seqlen_info.seqlen_q - last, cutlass.Int32)
        near = m_idx - n_idx < window_ssa
        return (n_idx <= m_idx) & ((n_idx < sink_ssa) | near | (m_idx >= first_last))

    MADE[sink, window, last] = keep
    return keep
