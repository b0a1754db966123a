"""The backward pass, as PyTorch's autograd sees it.

Kept from forward to backward: q, k, v, the output and the lse, and the call's data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from triton.runtime.errors import OutOfResources

from maskdsl.codegen.backward import TritonBackward, backward_of
from maskdsl.codegen.kernel import Call, TritonForward
from maskdsl.errors import ResourceError
from maskdsl.inputs import second_gradient_error
from maskdsl.settings import debug
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.hopper_backward import HopperBackward

Tensor = torch.Tensor


def prepare_gradients(forward: TritonForward, q: Tensor, k: Tensor, v: Tensor, shape: Shape,
                      scale: float, layout: str, with_lse: bool, deterministic: bool) -> Call:
    """Like `TritonForward.prepare`, for calls that autograd records."""
    call = prepare_backward(forward, q, k, v, shape, scale, layout, deterministic)
    return lambda q, k, v, data: call(q, k, v, data, with_lse)


def prepare_backward(forward: TritonForward, q: Tensor, k: Tensor, v: Tensor, shape: Shape,
                     scale: float, layout: str, deterministic: bool) -> Backward:
    """What the backward pass of calls that look like this one shares.

    deterministic  the same bits every time, also where atomics are faster
    """
    from maskdsl.codegen.hopper_backward import hopper_backward_of, refuse_call

    run = forward.prepare(q, k, v, shape, scale, layout, True)
    refused = refuse_call(forward, q, k, v)
    debug(1, f"gradients of {forward.mask!r}: {refused or 'the Hopper backward'}")
    kernels: TritonBackward | HopperBackward = \
        backward_of(forward.mask, forward.chosen, forward.scores) if refused else \
        hopper_backward_of(forward.mask, q.shape[1] // k.shape[1])
    return Backward(kernels, run, shape, scale, layout == "blhd", deterministic)


class Backward:
    """What the backward pass of one kind of call shares.

    forward  runs the call: (q, k, v, data) -> (output, lse)
    turned   tensors are [B, L, H, D]
    deterministic  gradients are to be the same bits every time
    """

    def __init__(self, kernels: TritonBackward | HopperBackward, forward: Callable[..., Any],
                 shape: Shape, scale: float, turned: bool, deterministic: bool = False) -> None:
        self.kernels, self.forward = kernels, forward
        self.shape, self.scale, self.turned = shape, scale, turned
        self.deterministic = deterministic
        self.names = tuple(mod.name for mod in kernels.scores if mod.name)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, data: dict[str, Any],
                 with_lse: bool) -> Any:
        """Output, or (output, lse), with gradients."""
        floats = [data[name] for name in self.names]
        out, lse = _Attention.apply(q, k, v, self, data, *floats)  # type: ignore[no-untyped-call]
        return (out, lse) if with_lse else out

    def gradients(self, tensors: tuple[Tensor, ...], grad_out: Tensor | None,
                  grad_lse: Tensor | None, wanted: tuple[bool, bool], data: dict[str, Any],
                  names: frozenset[str] = frozenset()) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv) in the call's layout, then those of the modifiers' data in `names`."""
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
                found = self.kernels.run(self, (*rows, lse), self.turn(grad_out), grad_lse, wanted,
                                         data, names)
            except OutOfResources as error:
                raise ResourceError("a backward pass", f"its kernel does not fit the device: "
                                    f"{error}", "a smaller tile, or leave tile out") from error
        return (*(None if t is None else self.turn(t) for t in found[:3]), *found[3:])

    def turn(self, t: Tensor) -> Tensor:
        """[B, L, H, D] as [B, H, L, D], and back, where the layout asks for it."""
        return t.transpose(1, 2) if self.turned else t


class _Attention(torch.autograd.Function):
    """Attention whose gradients are kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Backward, data: dict[str, Any],
                *floats: Tensor) -> Any:
        out, lse = call.forward(q, k, v, data)
        ctx.save_for_backward(q, k, v, out, lse, *floats)
        ctx.call = call
        ctx.lists = {name: value for name, value in data.items() if name not in call.names}
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        call, needs = ctx.call, ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * len(needs)
        wanted = (needs[0], needs[1] or needs[2])
        names = frozenset(name for name, need in zip(call.names, needs[5:], strict=True) if need)
        found = _Gradients.apply(  # type: ignore[no-untyped-call]
            *ctx.saved_tensors, *grads, call, wanted, ctx.lists, names)
        kept = [g if need else None for g, need in zip(found, (*needs[:3], *needs[5:]),
                                                       strict=True)]
        return (*kept[:3], None, None, *kept[3:])


class _Gradients(torch.autograd.Function):
    """The gradients, as a function that says that it has none of its own."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        """arguments: q, k, v, output, lse, the modifiers' data, the gradients of output and lse,
        call, wanted, lists, names."""
        *tensors, grad_out, grad_lse, call, wanted, lists, names = arguments
        data = lists | dict(zip(call.names, tensors[5:], strict=True))
        return call.gradients(tuple(tensors[:5]), grad_out, grad_lse, wanted, data, names)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise second_gradient_error()
