"""cuDNN's flex attention (wheel nvidia-cudnn-frontend): a plan of key intervals for each query."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case, Pattern
from benchmarks.peers import Peer, Prepared, Tensors, build_twice, turn


class CudnnFlex(Peer):
    """`cudnn.flex_attention` of 1.32: "mask function" int32[1, F, L], then a plan, then calls.

    The mask function gives, for each query, the live keys as [0, F0) | [F1, F2) | ..., sorted;
    plan and function depend on the geometry of the call alone and can be kept. Both are built in
    `mask_ms`. It needs an H100, B200 or B300; head dimensions are multiples of 8 up to 128, or 256.
    """

    key, name = "cudnn", "cuDNN flex_attention"
    package, module = "nvidia-cudnn-frontend", "cudnn.flex_attention"

    def expresses(self, pattern: Pattern) -> bool:
        return True

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        from cudnn.flex_attention import create_mask_plan, flex_attn_func

        q, k, v = turn(tensors)

        def build() -> Any:
            function = case.pattern.intervals(case.length, q.device)[None]
            return create_mask_plan(function, q, k, v, build_backward=False)

        plan, ms, first = build_twice(build)
        return Prepared(lambda: flex_attn_func(q, k, v, mask_plan=plan), blhd=True, mask_ms=ms,
                        mask_first_s=first)
