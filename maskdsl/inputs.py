"""Checks on the tensors of a call, all before anything is computed."""

from __future__ import annotations

import math

import torch

from maskdsl.errors import (
    DeviceError,
    DtypeError,
    GradientError,
    HeadCountError,
    HeadDimError,
    LayoutError,
    LengthError,
    MaskTypeError,
    RankError,
    ScaleError,
    ShapeError,
)
from maskdsl.shape import Shape

LAYOUTS = {"bhld": "[B, H, L, D]", "blhd": "[B, L, H, D]"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_DIM, MAX_DIM = 16, 256
MAX_LENGTH = 1 << 29  # tokens; with atom sizes up to 2**30 every bound stays within 32 bits


def check_layout(layout: str) -> str:
    """A known layout name, or a LayoutError."""
    if layout not in LAYOUTS:
        raise LayoutError(f"layout={layout!r}", "unknown layout",
                          " or ".join(f"layout={name!r} for {text}" for name, text in
                                      LAYOUTS.items()))
    return layout


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def check_ranks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> None:
    """q, k and v are four-dimensional tensors."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, torch.Tensor):
            raise MaskTypeError(f"{name} of type {type(t).__name__}", "not a torch.Tensor",
                                f"a tensor {LAYOUTS[layout]}")
        if t.dim() != 4:
            raise RankError(f"{name} {list(t.shape)}", f"{name} has {t.dim()} dimensions, not 4",
                            f"a tensor {LAYOUTS[layout]}; {name}.unsqueeze(0) adds a batch of one")


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                  dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """q, k, v as [B, H, L, D] views fit together and with the kernels."""
    if not q.dtype == k.dtype == v.dtype:
        raise DtypeError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}", "the dtypes differ",
                         f"one dtype for all, for example k.to({q.dtype})")
    if q.dtype not in dtypes:
        raise DtypeError(f"tensors of {q.dtype}", "not a dtype this backend computes in",
                         " or ".join(str(d) for d in dtypes))
    if not q.device == k.device == v.device:
        raise DeviceError(f"q on {q.device}, k on {k.device}, v on {v.device}",
                          "the devices differ", "move all three to one device")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ShapeError(_sizes(q, k, v), "the batch sizes differ", "equal first dimensions")
    if k.shape[1:3] != v.shape[1:3]:
        raise ShapeError(_sizes(q, k, v), "k and v differ in heads or length",
                         "k and v with the same number of heads and keys")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or q.shape[1] == 0:
        raise HeadCountError(_sizes(q, k, v), f"{q.shape[1]} query heads cannot share "
                             f"{k.shape[1]} key/value heads evenly",
                             "a number of query heads that is a multiple of the key/value heads")
    _check_dims(q, k, v)


def _check_dims(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.shape[3] != k.shape[3]:
        raise HeadDimError(_sizes(q, k, v), f"q has head dimension {q.shape[3]}, k has "
                           f"{k.shape[3]}", "equal head dimensions (v may have another)")
    for name, t in (("q", q), ("v", v)):
        if not MIN_DIM <= t.shape[3] <= MAX_DIM:
            raise HeadDimError(_sizes(q, k, v), f"the head dimension {t.shape[3]} of {name} is "
                               f"outside {MIN_DIM}..{MAX_DIM}",
                               f"a head dimension of {MIN_DIM} to {MAX_DIM}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1 and t.numel():
            raise LayoutError(f"{name} with strides {t.stride()}",
                              "the last dimension is not contiguous, and no copy is made in secret",
                              f"{name}.contiguous()")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale; default head_dim ** -0.5."""
    if scale is None:
        return float(head_dim**-0.5)
    try:
        number = float(scale)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ScaleError(f"scale={scale!r}", "the scale must be a finite number >= 0",
                         "scale=0.125; for a negative scale negate q")
    return number


def check_limit(limit: int | None, shape: Shape, mask: object) -> None:
    """The call is not longer than the mask is defined for, nor than 32-bit positions reach."""
    asked = max(shape.q_offset + shape.q_len, shape.kv_len)
    if limit is not None and asked > limit:
        raise LengthError(f"{mask!r} on {asked} tokens",
                          f"this mask says nothing beyond {limit} tokens",
                          f"at most {limit} tokens, or more blocks in the mask")
    longest = max(asked, shape.total_len)
    if longest > MAX_LENGTH or -shape.q_offset > MAX_LENGTH:
        raise LengthError(f"a call of {longest} tokens",
                          f"kernels count positions in 32 bits, up to {MAX_LENGTH}",
                          f"at most {MAX_LENGTH} tokens")


def check_heads(wanted: int | None, heads: int) -> None:
    """The call has as many query heads as `PerHead` lists."""
    if wanted is not None and wanted != heads:
        raise HeadCountError(f"q with {heads} heads", f"PerHead lists masks for {wanted}",
                             f"{wanted} query heads, or a list of {heads} masks")


def wants_gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *more: object) -> bool:
    """Whether autograd records this call."""
    return torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
        or any(isinstance(t, torch.Tensor) and t.requires_grad for t in more))


def gradient_error() -> GradientError:
    """The error of a call that wants gradients from a mask compiled without them."""
    return GradientError("inputs with requires_grad=True, and compile(..., backward=False)",
                         "the mask was compiled without gradients",
                         "compile(...) without backward=False, or torch.no_grad() around the call, "
                         "or tensor.detach()")


def second_gradient_error() -> GradientError:
    """The error of a derivative of what the kernels, or the operator of a graph, derived."""
    return GradientError("a gradient of a gradient (create_graph=True) through the kernels or "
                         "torch.compile", "the kernels compute first derivatives only, and so does "
                         "the operator that a graph holds",
                         "compile(..., backend='torch') outside torch.compile, which can be "
                         "differentiated twice")
