"""Which backend computes a mask, here and now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from maskdsl.errors import BackendError, GradientError
from maskdsl.expr import Mask

if TYPE_CHECKING:
    from maskdsl.codegen.kernel import TritonForward
    from maskdsl.codegen.torch_backend import TorchForward

BACKENDS = ("hopper", "triton", "torch")


def pick_backend(backend: str | None, mask: Mask, tile: object = None,
                 scores: bool = False) -> str:
    """The backend asked for, or the one for this machine, mask, tile and modifiers of scores."""
    if backend is None:
        if not torch.cuda.is_available():
            return "torch"
        from maskdsl.codegen.hopper import is_hopper
        from maskdsl.codegen.hopper_cut import refuse_mask

        plain = tile is None and not scores
        return "hopper" if plain and is_hopper() and not refuse_mask(mask) else "triton"
    if backend not in BACKENDS:
        raise BackendError(f"backend={backend!r}", "unknown backend",
                           " or ".join(f"backend={name!r}" for name in BACKENDS))
    return backend


def check_backward(backward: object) -> None:
    """A GradientError for what says neither that gradients are wanted nor that they are not."""
    if backward not in (True, False, "deterministic"):
        raise GradientError(f"backward={backward!r}", "no such backward pass",
                            "backward=True, backward='deterministic' or backward=False")


def tell_refusal(forward: TritonForward | TorchForward, tensors: tuple[torch.Tensor, ...],
                 turned: bool, backward: bool) -> str:
    """Why the Hopper kernel (or backward) does not take q, k, v; "" where it does.

    turned  they are [B, L, H, D]
    """
    from maskdsl.codegen.hopper_backward import refuse_call
    from maskdsl.codegen.kernel import TritonForward

    if not isinstance(forward, TritonForward):
        return "backend='torch'"
    q, k, v = (t.transpose(1, 2) if turned else t for t in tensors)
    return refuse_call(forward, q, k, v) if backward else forward.refuse_hopper(q, k, v)


def check_autotune(backend: str, tile: object, scores: bool) -> None:
    """A BackendError where there is nothing to time."""
    if scores:
        raise BackendError("autotune=True with scores=...", "kernels that modify scores have no "
                           "candidates yet", "leave autotune out")
    if tile is not None:
        raise BackendError(f"autotune=True with tile={tile!r}", "autotune chooses the tile",
                           "one of the two")
    if backend == "torch":
        raise BackendError("autotune=True with backend='torch'",
                           "only the kernels for GPUs have settings to choose from",
                           "leave autotune out, or backend='triton' where there is a GPU")
    from maskdsl.codegen.kernel import interpreting

    if interpreting():
        raise BackendError("autotune=True with TRITON_INTERPRET=1",
                           "times in the interpreter say nothing of a GPU",
                           "leave autotune out, or run without TRITON_INTERPRET")
