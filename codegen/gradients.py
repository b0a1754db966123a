"""The backward pass of a static mask, as PyTorch's autograd sees it.

Kept from forward to backward: q, k, v, the output and the lse; made in backward: delta (float32,
as large as the lse) and the gradients. Gradients that nobody asked for are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Protocol

import torch
from triton.runtime.errors import OutOfResources

from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit_backward import emit_backward
from maskdsl.codegen.kernel import (
    LEAST_SCALE,
    LOG2_E,
    Call,
    TritonForward,
    arch_of,
    common_alignment,
    kernel_constants,
    live_strides,
)
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.row_bounds import make_key_plan
from maskdsl.codegen.tune import Config, pick_backward
from maskdsl.dynamic import slots_of
from maskdsl.errors import GradientError, ResourceError
from maskdsl.expr import Mask
from maskdsl.settings import debug
from maskdsl.shape import Shape

Tensor = torch.Tensor
DELTA_ROWS = 32  # query rows a program of `sum_rows`; not measured


def refuse_gradients(forward: TritonForward) -> str:
    """Why the kernels have no backward pass for this mask; "" where they have one."""
    if slots_of(forward.mask):
        names = ", ".join(atom.slot for atom in slots_of(forward.mask))
        return f"masks with runtime slots ({names}) have no backward pass on a GPU yet"
    if forward.kinds[0][0]:
        return "PerHead masks of several kinds have no backward pass on a GPU yet"
    if forward.scores:
        names = ", ".join(type(mod).__name__ for mod in forward.scores)
        return f"score modifiers ({names}) have no backward pass on a GPU yet"
    return ""


class TritonBackward:
    """The gradients' kernels of one static mask."""

    def __init__(self, mask: Mask, config: Config | None) -> None:
        """config: the tile of both walks, where the user chose one."""
        self.mask, self.chosen = mask, config
        self.modules: dict[tuple[Config, Config], Any] = {}

    def configs(self, arch: str, head_dim: int, value_dim: int,
                item_size: int) -> tuple[Config, Config]:
        """The configs of the walks by query tile and by key tile."""
        if self.chosen is not None:
            return self.chosen, self.chosen
        return pick_backward(arch, head_dim, value_dim, item_size)

    def source(self, by_query: Config, by_key: Config) -> str:
        """The kernel file for two configs."""
        plan = make_plan(self.mask, by_query.block_m, by_query.block_n)
        return emit_backward(plan, make_key_plan(
            make_plan(self.mask, by_key.block_m, by_key.block_n)))

    def module(self, by_query: Config, by_key: Config) -> Any:
        """The kernels for two configs, written on first use."""
        if (by_query, by_key) not in self.modules:
            self.modules[by_query, by_key] = load_module(self.source(by_query, by_key))
            debug(1, f"backward of {self.mask!r}: {by_query} by query, {by_key} by key")
        return self.modules[by_query, by_key]

    def run(self, call: Backward, tensors: tuple[Tensor, ...], grad_out: Tensor,
            grad_lse: Tensor | None, wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv) as [B, H, L, D]; None where not wanted.

        tensors   q, k, v, output, all [B, H, L, D] views, and the lse, float32 [B, Hq, Lq]
        grad_lse  float32 [B, Hq, Lq], contiguous
        wanted    dq; dk and dv
        """
        q, k, v, out, lse = tensors
        shape = call.shape
        if not q.numel() or not shape.kv_len:
            return tuple(torch.zeros_like(t) for t in (q, k, v))
        delta = torch.empty_like(lse)
        dq = empty_rows(q) if wanted[0] else None
        dk, dv = (empty_rows(k), empty_rows(v)) if wanted[1] else (None, None)
        strides = {name: live_strides(t) for name, t in (
            ("q", q), ("k", k), ("v", v), ("o", out), ("g", grad_out), ("dq", dq), ("dk", dk),
            ("dv", dv)) if t is not None}
        align = common_alignment(list(strides.values()))
        steps = {name: [s // align for s in three] for name, three in strides.items()}
        by_query, by_key = self.configs(arch_of(q.device), q.shape[3], v.shape[3],
                                        q.dtype.itemsize)
        module = self.module(by_query, by_key)
        batch, heads = q.shape[:2]
        sizes = (batch * heads, heads, heads // k.shape[1], shape.q_len, shape.kv_len,
                 shape.q_offset, shape.total_len, max(call.scale, LEAST_SCALE) * LOG2_E, call.scale)
        inputs = (q, k, v, grad_out, lse, delta)
        shared = [*steps["q"], *steps["k"], *steps["v"], *steps["g"]]
        module.sum_rows[(-(-shape.q_len // DELTA_ROWS) * batch * heads,)](
            out, grad_out, lse, delta if grad_lse is None else grad_lse, delta, *steps["o"],
            *steps["g"], batch * heads, heads, shape.q_len,
            **row_constants(v.shape[3], align, grad_lse is not None))
        if dq is not None:
            module.query_gradients[(-(-shape.q_len // by_query.block_m) * batch * heads,)](
                *inputs, dq, *shared, *steps["dq"], *sizes,
                **launch_options(by_query, q, v.shape[3], align))
        if dk is not None:
            module.key_gradients[(-(-shape.kv_len // by_key.block_n) * batch * k.shape[1],)](
                *inputs, dk, dv, *shared, *steps["dk"], *steps["dv"], *sizes,
                **launch_options(by_key, q, v.shape[3], align))
        return dq, dk, dv


@lru_cache(maxsize=256)
def backward_of(mask: Mask, config: Config | None) -> TritonBackward:
    """The gradients' kernels of a mask; calls of many shapes share them."""
    return TritonBackward(mask, config)


def empty_rows(t: Tensor) -> Tensor:
    """An empty tensor like `t`, with a contiguous last dimension."""
    made = torch.empty_like(t)
    return made if made.stride(3) == 1 else torch.empty(t.shape, dtype=t.dtype, device=t.device)


def backward_constants(config: Config, dtype: torch.dtype, head_dim: int, value_dim: int,
                       align: int) -> dict[str, Any]:
    """The constexpr arguments of `query_gradients` and `key_gradients`."""
    constants = kernel_constants(config, dtype, head_dim, value_dim, align, False, False)
    return {name: value for name, value in constants.items()
            if name not in ("USE_TMA", "WITH_LSE")}


def row_constants(value_dim: int, align: int, with_lse: bool) -> dict[str, Any]:
    """The constexpr arguments of `sum_rows`."""
    return {"VALUE_DIM": value_dim, "V_BLOCK": 1 << (value_dim - 1).bit_length(),
            "BLOCK_M": DELTA_ROWS, "ALIGN": align, "WITH_LSE": with_lse}


def launch_options(config: Config, q: Tensor, value_dim: int, align: int) -> dict[str, Any]:
    """Constants and launch options of one kernel."""
    return {**backward_constants(config, q.dtype, q.shape[3], value_dim, align),
            "num_warps": config.warps, "num_stages": config.stages}


def prepare_gradients(forward: TritonForward, q: Tensor, k: Tensor, v: Tensor, shape: Shape,
                      scale: float, layout: str, with_lse: bool, *, adds: bool = False) -> Call:
    """Like `TritonForward.prepare`, for calls that autograd records."""
    from maskdsl.codegen.hopper_backward import hopper_backward_of, refuse_call

    run = forward.prepare(q, k, v, shape, scale, layout, True)
    kernels: Kernels = backward_of(forward.kinds[0][1], forward.chosen)
    if refused := refuse_call(forward, q, k, v):
        debug(1, f"gradients of {forward.mask!r} by the portable kernels: {refused}")
    else:
        kernels = hopper_backward_of(forward.mask, q.shape[1] // k.shape[1], adds)
    call = Backward(kernels, run, shape, scale, layout == "blhd")
    return lambda q, k, v, data: call(q, k, v, with_lse)


class Kernels(Protocol):
    """What computes the gradients of a call."""

    def run(self, call: Backward, tensors: tuple[Tensor, ...], grad_out: Tensor,
            grad_lse: Tensor | None, wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv), as `TritonBackward.run`."""


class Backward:
    """What the backward pass of one kind of call shares.

    forward  runs the call: (q, k, v, data) -> (output, lse)
    turned   tensors are [B, L, H, D]
    """

    def __init__(self, kernels: Kernels, forward: Callable[..., Any], shape: Shape,
                 scale: float, turned: bool) -> None:
        self.kernels, self.forward = kernels, forward
        self.shape, self.scale, self.turned = shape, scale, turned

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, with_lse: bool) -> Any:
        """Output, or (output, lse), with gradients."""
        out, lse = _Attention.apply(q, k, v, self)  # type: ignore[no-untyped-call]
        return (out, lse) if with_lse else out

    def gradients(self, tensors: tuple[Tensor, ...], grad_out: Tensor | None,
                  grad_lse: Tensor | None,
                  wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv) in the call's layout."""
        q, k, v, out, lse = tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.contiguous()
        rows = tuple(map(self.turn, (q, k, v, out)))
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            try:
                found = self.kernels.run(self, (*rows, lse), self.turn(grad_out), grad_lse, wanted)
            except OutOfResources as error:
                raise ResourceError("a backward pass", f"its kernel does not fit the device: "
                                    f"{error}", "a smaller tile, or leave tile out") from error
        return tuple(None if t is None else self.turn(t) for t in found)

    def turn(self, t: Tensor) -> Tensor:
        """[B, L, H, D] as [B, H, L, D], and back, where the layout asks for it."""
        return t.transpose(1, 2) if self.turned else t


class _Attention(torch.autograd.Function):
    """Attention whose gradients are kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Backward) -> Any:
        out, lse = call.forward(q, k, v, {})
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return None, None, None, None
        wanted = (ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3]))
        found = _Gradients.apply(  # type: ignore[no-untyped-call]
            *ctx.saved_tensors, *grads, ctx.call, wanted)
        return (*(g if need else None for g, need in
                  zip(found, ctx.needs_input_grad[:3], strict=True)), None)


class _Gradients(torch.autograd.Function):
    """The gradients, as a function that says that it has none of its own."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                grad_out: Tensor | None, grad_lse: Tensor | None, call: Backward,
                wanted: tuple[bool, bool]) -> Any:
        return call.gradients((q, k, v, out, lse), grad_out, grad_lse, wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError("a gradient of a gradient (create_graph=True) through backward=True",
                            "the kernels compute first derivatives only",
                            "compile(..., backend='torch'), which can be differentiated twice")
