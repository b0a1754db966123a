"""How fast is the backward pass: two triangles, a window, dense, beside every peer with gradients.

Each row is the time of the gradients of q, k and v alone, and of forward and backward together, all
in one run; 32K tokens, one batch entry, 32 query and 8 key/value heads, bfloat16. A kernel whose
gradients differ from ours has no time. cuDNN's flexible attention, FlashAttention 4 (no triangles)
and, without a mask, cuDNN through SDPA take part where they are installed; at head dimension 64
only ours and FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

import maskdsl
from benchmarks.cases import TRIANGLES, Case, Pattern
from benchmarks.measure import DIM, HEADS, Report, make_inputs, time_ms
from benchmarks.peer_fa4 import FlashAttention4
from benchmarks.peer_flex import mask_mod
from benchmarks.peers import turn

LENGTH, LONG = 32768, 131072
DETERMINISTIC = "maskdsl, Hopper, deterministic"
PATTERNS = (Pattern(), TRIANGLES[1], TRIANGLES[0], Pattern(window=1024))
WRONG = 0.02  # relative difference of a gradient, bfloat16
Run = Callable[..., torch.Tensor]
FAILURES = (RuntimeError, ValueError, TypeError, ImportError)


def gradient_flops(pattern: Pattern, length: int, dim: int = DIM) -> float:
    """Five products of 2 * D operations a live pair and head: scores again, dP, dV, dK and dQ."""
    return 10.0 * dim * HEADS * pattern.pairs(length)


def flex_call(pattern: Pattern, length: int) -> Run:
    """FlexAttention with its own settings."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    tables = create_block_mask(mask_mod(pattern, length), None, None, length, length,
                               device="cuda", _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q, k, v, block_mask=tables, enable_gqa=True)


def cudnn_call(pattern: Pattern, length: int) -> Run:
    """cuDNN's flexible attention; its plan is made at the first call."""
    from cudnn.flex_attention import create_mask_plan, flex_attn_func

    plans: list[Any] = []

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        turned = turn(leaves)
        if not plans:
            intervals = pattern.intervals(length, leaves[0].device)[None]
            plans.append(create_mask_plan(intervals, *turned, build_backward=True))
        out = flex_attn_func(*turned, mask_plan=plans[0])
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found.transpose(1, 2)

    return call


def fa4_call(pattern: Pattern, length: int) -> Run:
    """FlashAttention 4."""
    def call(*leaves: torch.Tensor) -> torch.Tensor:
        ready = FlashAttention4().ready(Case(pattern, length), leaves, 0.0)
        found: torch.Tensor = ready.output(ready.run())
        return found

    return call


def sdpa_call() -> Run:
    """cuDNN through PyTorch, dense causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                *leaves, is_causal=True, enable_gqa=True)

    return call


def is_installed(module: str) -> bool:
    """Whether a module can be found, packages above it included."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def hopper_call(pattern: Pattern, backward: bool | str = True) -> Run:
    """The Hopper backward, which must take the call."""
    attn: Any = maskdsl.compile(pattern.mask, backend="hopper", backward=backward)

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        refused = attn.refusal(*leaves, backward=True)
        if refused:
            raise ValueError(refused)
        out: torch.Tensor = attn(*leaves)
        return out

    return call


def kernels_of(pattern: Pattern, length: int, dim: int = DIM) -> dict[str, Callable[[], Run]]:
    """What is compared: ours first."""
    found: dict[str, Callable[[], Run]] = {
        "maskdsl, portable": lambda: maskdsl.compile(pattern.mask, backend="triton"),
        "maskdsl, Hopper": lambda: hopper_call(pattern),
        "FlexAttention": lambda: flex_call(pattern, length),
    }
    if dim != DIM:
        return found
    if pattern.window is None:
        found[DETERMINISTIC] = lambda: hopper_call(pattern, "deterministic")
    if is_installed("cudnn.flex_attention"):
        found["cuDNN flex_attention"] = lambda: cudnn_call(pattern, length)
    if pattern.window is None:
        found["cuDNN through SDPA"] = sdpa_call
    if is_installed("flash_attn.cute") and not pattern.sink:  # with one it needs lists by key, too
        found["FlashAttention 4"] = lambda: fa4_call(pattern, length)
    return found


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
    """Dense causal attention, both triangles and a window; both head dimensions."""
    from torch._functorch import config

    config.donated_buffer = False  # FlexAttention's backward runs many times
    for dim in (DIM, 64):
        for pattern in PATTERNS:
            measure_all(report, pattern, dim)
    if torch.cuda.is_available():
        measure_memory(report, TRIANGLES[0], LONG, ("maskdsl, portable", "maskdsl, Hopper"))
        measure_memory(report, Pattern(), LENGTH, ("maskdsl, Hopper", DETERMINISTIC))


def measure_all(report: Report, pattern: Pattern, dim: int) -> None:
    """A row for each kernel."""
    leaves = tuple(t.requires_grad_() for t in make_inputs(LENGTH, dim=dim))
    grad = torch.randn_like(leaves[0])
    expected: tuple[torch.Tensor, ...] = ()
    ours = 0.0
    for name, make in kernels_of(pattern, LENGTH, dim).items():
        if report.is_late(f"{name} on {pattern.key}"):
            continue
        row: dict[str, Any] = {"mask": pattern.key, "length": LENGTH, "dim": dim, "kernel": name}
        try:
            found, times = measure(make(), leaves, grad)
        except FAILURES as error:  # one kernel must not cost the others
            report.add(**row, failed=f"{type(error).__name__}: {error}"[:200])
            continue
        expected = expected or found
        gap = max(float((a - b).float().norm() / b.float().norm())
                  for a, b in zip(found, expected, strict=True))
        if gap > WRONG:
            report.add(**row, failed=f"gradients differ from ours by {gap:.3f}")
            continue
        ours = ours or times["ms"]
        report.add(**row, **times, tflops=gradient_flops(pattern, LENGTH, dim) / times["ms"] / 1e9,
                   ms_over_portable=times["ms"] / ours, gap_to_portable=gap)


def measure_memory(report: Report, pattern: Pattern, length: int, names: tuple[str, ...]) -> None:
    """One training step of a layer: the most memory beyond inputs, output and gradients."""
    leaves = tuple(t.requires_grad_() for t in make_inputs(length))
    grad = torch.randn_like(leaves[0])
    for name in names:
        call = kernels_of(pattern, length)[name]()

        def step(call: Run = call) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(call(*leaves), leaves, grad)

        ms = time_ms(step)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        kept = leaves[0].nbytes + sum(t.nbytes for t in leaves)  # the output, the gradients
        extra = torch.cuda.max_memory_allocated() - before - kept
        report.add(mask=pattern.key, length=length, dim=DIM, kernel=name, with_forward_ms=ms,
                   mib_beyond_output_and_gradients=extra / 2**20,
                   mib_of_lse_and_delta=2 * 4 * HEADS * length / 2**20)
