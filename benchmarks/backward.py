"""How fast is the backward pass of a triangle, beside FlexAttention's on the same mask?

Each row is the time of the gradients of q, k and v alone, and of forward and backward together, all
in one run; 32K tokens. A kernel whose gradients differ from ours has no time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import maskdsl
from benchmarks.cases import TRIANGLES, Pattern
from benchmarks.measure import DIM, HEADS, Report, make_inputs, time_ms
from benchmarks.peer_flex import mask_mod

LENGTH = 32768
WRONG = 0.02  # relative difference of a gradient, bfloat16
Run = Callable[..., torch.Tensor]


def gradient_flops(pattern: Pattern, length: int) -> float:
    """Five products of 2 * D operations a live pair and head: scores again, dP, dV, dK and dQ."""
    return 10.0 * DIM * HEADS * pattern.pairs(length)


def flex_call(pattern: Pattern, length: int) -> Run:
    """FlexAttention with its own settings."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    tables = create_block_mask(mask_mod(pattern, length), None, None, length, length,
                               device="cuda", _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q, k, v, block_mask=tables, enable_gqa=True)


def kernels_of(pattern: Pattern, length: int) -> dict[str, Callable[[], Run]]:
    """What is compared: ours first, the portable kernel by its name."""
    return {
        "maskdsl, portable": lambda: maskdsl.compile(pattern.mask, backend="triton",
                                                     backward=True),
        "maskdsl, default": lambda: maskdsl.compile(pattern.mask, backward=True),
        "FlexAttention": lambda: flex_call(pattern, length),
    }


def measure(run: Run, leaves: tuple[torch.Tensor, ...],
            grad: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, float]]:
    """The gradients, and milliseconds."""
    out = run(*leaves)

    def backward() -> Any:
        return torch.autograd.grad(out, leaves, grad, retain_graph=True)

    found = backward()
    ms = time_ms(backward)
    both = time_ms(lambda: torch.autograd.grad(run(*leaves), leaves, grad))
    return found, {"ms": ms, "with_forward_ms": both}


def run(report: Report) -> None:
    """Both triangles and dense causal attention."""
    from torch._functorch import config

    config.donated_buffer = False  # FlexAttention's backward runs many times
    for pattern in (TRIANGLES[1], TRIANGLES[0], Pattern()):
        leaves = tuple(t.requires_grad_() for t in make_inputs(LENGTH))
        grad = torch.randn_like(leaves[0])
        expected: tuple[torch.Tensor, ...] = ()
        ours = 0.0
        for name, make in kernels_of(pattern, LENGTH).items():
            row: dict[str, Any] = {"mask": pattern.key, "length": LENGTH, "kernel": name}
            try:
                found, times = measure(make(), leaves, grad)
            except (RuntimeError, ValueError) as error:  # one kernel must not cost the others
                report.add(**row, failed=f"{type(error).__name__}: {error}"[:200])
                continue
            expected = expected or found
            gap = max(float((a - b).float().norm() / b.float().norm())
                      for a, b in zip(found, expected, strict=True))
            if gap > WRONG:
                report.add(**row, failed=f"gradients differ from ours by {gap:.3f}")
                continue
            ours = ours or times["ms"]
            report.add(**row, **times, tflops=gradient_flops(pattern, LENGTH) / times["ms"] / 1e9,
                       ms_over_ours=times["ms"] / ours, gap_to_ours=gap)
