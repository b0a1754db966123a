"""`compile(mask, autotune=True)`: the candidates for a call, and the call with the best of them."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import triton

from maskdsl.codegen.choices import Kind, Run, Setting, Tuned, Tuner, code_digest, time_call
from maskdsl.codegen.emit import emit_kernels
from maskdsl.codegen.hopper_cut import HopperConfig, other_rooms, packs, pick_hopper, room_config
from maskdsl.codegen.kernel import (
    Call,
    TritonForward,
    arch_of,
    check_device,
    common_alignment,
    fits_tma,
    live_strides,
)
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.tune import Config, fits_chip, power_of_two
from maskdsl.dynamic import slots_of
from maskdsl.errors import BackendError
from maskdsl.expr import Mask
from maskdsl.shape import Shape
from maskdsl.version import VERSION

# (block_m, block_n, warps, stages), beside the default of `pick_config`. Those that cannot fit the
# chip's shared memory are left out; what spills loses by its time.
NVIDIA = ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2),
          (64, 128, 4, 2), (64, 32, 4, 4), (64, 32, 4, 2), (128, 128, 8, 2), (128, 32, 4, 3))
NVIDIA_WIDE = ((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (64, 32, 8, 3),
               (128, 64, 8, 2), (32, 32, 4, 2))  # head dimensions beyond 128
NVIDIA_FLOAT32 = ((32, 16, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1), (64, 16, 8, 1), (16, 32, 4, 1),
                  (16, 16, 4, 1))
AMD = ((64, 64, 4, 1), (128, 64, 4, 1), (128, 64, 8, 1), (128, 32, 4, 1), (64, 32, 4, 1),
       (64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1),
       (32, 16, 4, 1))
INTERPRETER = ((32, 32, 4, 1), (16, 16, 4, 1), (64, 32, 4, 1))  # for tests: nothing to be gained

TUNER = Tuner(time_call)


def portable_candidates(arch: str, head_dim: int, value_dim: int, item_size: int,
                        default: Config) -> tuple[Config, ...]:
    """Configs of the portable kernel that fit a chip, the default first."""
    listed: tuple[tuple[int, int, int, int], ...]
    if arch == "cpu":
        listed = INTERPRETER
    elif arch.startswith("gfx"):
        listed = AMD
    elif item_size == 4:
        listed = NVIDIA_FLOAT32
    else:
        listed = NVIDIA_WIDE if max(head_dim, value_dim) > 128 else NVIDIA
    found = dict.fromkeys((default, *(Config(*sizes) for sizes in listed)))
    return tuple(c for c in found if fits_chip(c, arch, head_dim, value_dim, item_size))


def hopper_candidates(mask: Mask, group: int, head_dim: int,
                      value_dim: int = 0) -> tuple[HopperConfig, ...]:
    """Configs of the Hopper kernel, the default first: heads that share their key tiles, the width
    of the first tile, and how shared memory is divided."""
    default = pick_hopper(mask, group, head_dim, value_dim)
    packed = [n for n in (4, 2, 1) if group % n == 0 and packs(mask, n)]
    made = (replace(default, heads_packed=n, narrow=narrow) for n in packed
            for narrow in (32, 64, 128) if narrow <= default.block_n)
    rooms = tuple(room_config(default, *room) for room in other_rooms(head_dim, value_dim))
    return tuple(dict.fromkeys((default, *made, *rooms)))


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Autotuned:
    """The kernels of one mask with measured settings."""

    def __init__(self, forward: TritonForward, tuner: Tuner | None = None) -> None:
        self.forward = forward
        self.tuner = tuner or TUNER
        self.choices: dict[Kind, Tuned] = {}

    @cached_property
    def program(self) -> str:
        """A hash of the kernel's text for one tile size, which says all that the mask does."""
        plans = tuple(make_plan(mask, 64, 64) for _, mask in self.forward.kinds)
        heads = tuple(len(heads) for heads, _ in self.forward.kinds if heads)
        return hashlib.sha256(emit_kernels(plans, heads).encode()).hexdigest()[:24]

    def kind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> Kind:
        """The kind of a call; q, k, v are [B, H, L, D] views."""
        strides = [live_strides(t) for t in (q, k, v)]
        hopper = not self.forward.refuse_hopper(q, k, v)
        arch = arch_of(q.device)
        name = f" {torch.cuda.get_device_name(q.device)}" if q.is_cuda else ""
        return Kind(
            self.program, repr(self.forward.mask), arch + name,
            f"maskdsl {VERSION} {code_digest()}, triton {triton.__version__}, "
            f"torch {torch.__version__}",
            ("hopper" if self.forward.must else "both") if hopper else "portable",
            str(q.dtype).removeprefix("torch."), q.shape[3], v.shape[3], common_alignment(strides),
            fits_tma(k, strides[1]) and fits_tma(v, strides[2]), q.shape[1] // k.shape[1],
            power_of_two(q.shape[0] * q.shape[1]), power_of_two(shape.q_len),
            power_of_two(shape.kv_len))

    def candidates(self, kind: Kind, arch: str, item_size: int) -> tuple[Setting, ...]:
        """What is tried for a kind of call, the default first."""
        found: tuple[Setting, ...] = ()
        if kind.kernels != "portable":
            found = hopper_candidates(self.forward.mask, kind.group, kind.head_dim,
                                      kind.value_dim)
        if kind.kernels != "hopper":
            sizes = kind.head_dim, kind.value_dim, item_size
            found += portable_candidates(arch, *sizes, self.forward.config(arch, *sizes))
        return found

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape,
                scale: float, layout: str, with_lse: bool, data: dict[str, Any]) -> Call:
        """`TritonForward.prepare` with the measured setting; times candidates on these tensors
        where their kind of call is new.

        data  of the mask's slots, checked
        """
        prepare = partial(self.forward.prepare, q, k, v, shape, scale, layout, with_lse)
        refused = self.forward.must and self.forward.refuse_hopper(q, k, v)
        if refused or not q.numel() or not shape.kv_len:
            return prepare()  # raises, or launches nothing
        if self.forward.must and slots_of(self.forward.mask):
            raise BackendError("autotune=True with backend='hopper' and call-time data",
                               "the Hopper kernel has one setting for such masks",
                               "leave autotune out, or backend='triton'")
        check_device(q)

        def start(setting: Setting) -> Run:
            return partial(prepare(setting), q, k, v, data)

        kind = self.kind(q, k, v, shape)
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            made = self.tuner.choose(
                kind, self.candidates(kind, arch_of(q.device), q.element_size()), start,
                may_time=not is_capturing(q.device))
        self.choices[kind] = made
        return prepare(made.setting)
