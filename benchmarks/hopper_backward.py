"""How fast is the Hopper backward, beside the portable kernels and FlexAttention, in one run?

FlashAttention 4 takes part without a sink where its wheel is installed. Times are of the backward
pass alone: 32K tokens, one batch entry, 32 query heads, 8 key/value heads, head dimension 128,
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import config as functorch

import maskdsl
from benchmarks.cases import Case, Pattern
from benchmarks.measure import Report, make_inputs, tera_flops, time_ms
from benchmarks.peer_fa4 import FlashAttention4
from benchmarks.peer_flex import FlexDefault
from benchmarks.peers import Prepared, Tensors

LENGTH = 32768
PASSES = 2.5  # work of a backward pass, in forwards: five products for two
MOST = 0.02  # of the gradients' norm: how far kernels may differ
PATTERNS = (Pattern(), Pattern(window=1024), Pattern(8, 512, 128), Pattern(64, 1024, 128))


def run(report: Report) -> None:
    """Dense causal, a window, two triangles."""
    functorch.donated_buffer = False  # or FlexAttention's graph cannot be kept
    for pattern in PATTERNS:
        q, k, v = (t.requires_grad_() for t in make_inputs(LENGTH))
        weight = torch.randn_like(q)
        expected: tuple[torch.Tensor, ...] = ()
        for label, prepare in kernels(Case(pattern, LENGTH), (q, k, v)).items():
            try:
                ready = prepare()
                out = ready.output(ready.run())
                found = torch.autograd.grad(out, (q, k, v), weight, retain_graph=True)
                ms = time_ms(torch.autograd.grad, out, (q, k, v), weight, retain_graph=True)
            except (RuntimeError, ValueError, TypeError, ImportError) as error:
                print(f"{label}: {type(error).__name__}: {error}", flush=True)
                continue
            expected = expected or found
            gap = max(map(distance, found, expected))
            assert gap < MOST, f"{label} and the first kernel differ by {gap}"
            report.add(mask=pattern.key, length=LENGTH, kernel=label, ms=ms,
                       tflops=PASSES * tera_flops(pattern.mask, LENGTH, ms), difference=gap)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def kernels(case: Case, tensors: Tensors) -> dict[str, Callable[[], Prepared]]:
    """How to make each kernel's forward pass ready; the portable one first."""
    found: dict[str, Callable[[], Prepared]] = {
        "maskdsl portable": lambda: ours(case, tensors, "triton"),
        "maskdsl Hopper": lambda: ours(case, tensors, "hopper"),
        "maskdsl Hopper, atomic": lambda: ours(case, tensors, "hopper", "atomic"),
        "FlexAttention default": lambda: FlexDefault().ready(case, tensors, 0.0)}
    if not case.pattern.sink:
        found["FlashAttention 4"] = lambda: FlashAttention4().ready(case, tensors, 0.0)
    return found


def ours(case: Case, tensors: Tensors, backend: str, backward: bool | str = True) -> Prepared:
    """The backward of one backend, which must take the call."""
    attn: Any = maskdsl.compile(case.pattern.mask, backend=backend, backward=backward)
    refused = attn.refusal(*tensors, backward=True) if backend == "hopper" else ""
    assert not refused, refused
    return Prepared(lambda: attn(*tensors))
