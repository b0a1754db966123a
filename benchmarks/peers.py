"""The kernels that can be compared: ours, and every peer that is installed.

A peer is a class with three answers: is it installed, can it express a mask, and how is it run. All
imports of peers happen inside the methods, and nothing here needs a peer to be there.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import maskdsl
from benchmarks.cases import DEFAULT_DIM, Case, Pattern
from maskdsl import Causal, Shape
from maskdsl.simplify import simplify

Made = TypeVar("Made")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Prepared:
    """A call that is ready to be timed.

    run           computes the output, in the kernel's own layout; this is what is timed
    blhd          whether that layout is [B, L, H, D] rather than [B, H, L, D]
    mask_ms       milliseconds to build plan, tables or lists, once all is compiled; None: no such
    mask_first_s  seconds of the first build, with compilation
    visited       (query, key) pairs in the tiles that all heads visit; None where not known
    settings      what was chosen, for people
    tables        what was built, for the peer's own use
    """

    run: Callable[[], Any]
    blhd: bool = False
    mask_ms: float | None = None
    mask_first_s: float | None = None
    visited: int | None = None
    settings: str = ""
    tables: Any = None

    def output(self, result: Any) -> torch.Tensor:
        """What `run` returned as [B, H, L, D] (a view)."""
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out.transpose(1, 2) if self.blhd else out


class Peer:
    """A kernel to compare with. Subclasses set the names and say how it is called."""

    key: ClassVar[str]             # on the command line
    name: ClassVar[str]            # in the table
    package: ClassVar[str] = ""    # the wheel that holds it
    module: ClassVar[str] = "torch"  # what is imported to see whether it is there

    def missing(self) -> str:
        """Why it cannot run here; "" where it can be tried."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a broken wheel may raise anything while it is imported
            return f"{type(error).__name__}: {error}"
        return ""

    def version(self) -> str:
        """The wheel's version; "" for what is part of torch."""
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return "unknown"

    def expresses(self, pattern: Pattern) -> bool:
        """Whether the kernel has a way to say this mask, exactly and without wasted pairs."""
        raise NotImplementedError

    def prepare(self, case: Case, tensors: Tensors, deadline: float) -> Prepared | None:
        """A call on q, k, v [1, H, L, D]; None where the mask cannot be expressed.

        deadline: `time.monotonic()` by which trials of settings should stop.
        """
        return self.ready(case, tensors, deadline) if self.expresses(case.pattern) else None

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        """`prepare` for a mask the kernel can express."""
        raise NotImplementedError


def sync() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build_twice(build: Callable[[], Made]) -> tuple[Made, float, float]:
    """(what was built, milliseconds of a warm build, seconds of the first)."""
    times = []
    for _ in range(3):
        sync()
        start = time.perf_counter()
        made = build()
        sync()
        times.append(time.perf_counter() - start)
    return made, 1e3 * min(times[1:]), times[0]


def turn(tensors: Tensors) -> Tensors:
    """q, k, v as contiguous [B, L, H, D]; not timed, as a model would make them so."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in tensors)
    return q, k, v


class Ours(Peer):
    """maskdsl's own choice of kernel."""

    key, name = "ours", "maskdsl"
    backend: ClassVar[str | None] = None

    def missing(self) -> str:
        return ""

    def version(self) -> str:
        return maskdsl.__version__

    def expresses(self, pattern: Pattern) -> bool:
        return True

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        attn = maskdsl.compile(case.pattern.mask, backend=self.backend)
        refused = attn.refusal(*tensors) if attn.backend == "hopper" else ""
        backend = "triton" if refused else attn.backend
        return Prepared(lambda: attn(*tensors), visited=visited_pairs(attn, backend, case),
                        settings=f"backend {backend}{f' ({refused})' if refused else ''}")


class Portable(Ours):
    """maskdsl's portable Triton kernel."""

    key, name, backend = "portable", "maskdsl, portable", "triton"

    def missing(self) -> str:
        return "" if torch.cuda.is_available() else "no GPU"


def visited_pairs(attn: maskdsl.Attention, backend: str, case: Case) -> int | None:
    """Pairs in the tiles our kernel visits, all heads together; None for the portable kernel with
    another head dimension than the one `explain` tells about."""
    shape = Shape(case.length, case.length)
    if backend != "hopper":
        if case.dim != DEFAULT_DIM:
            return None
        told = attn.explain(case.length)
        return case.heads * told.visited_tiles * told.tile[0] * told.tile[1]
    from maskdsl.codegen.hopper_cut import count_steps, make_plans, pick_hopper

    mask = simplify(Causal() & case.pattern.mask)
    config = pick_hopper(mask, case.heads // case.kv_heads, case.dim, case.value_dim)
    (plan,) = make_plans(mask, config.span, config.tile)
    keys = config.narrow + config.block_n * np.asarray(count_steps(plan, config, shape))
    return int(case.heads * config.span * keys.sum())


class Sdpa(Peer):
    """torch's scaled_dot_product_attention; dense causal only."""

    chosen: ClassVar[SDPBackend]

    def expresses(self, pattern: Pattern) -> bool:
        return pattern.window is None

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        def run() -> torch.Tensor:
            with sdpa_kernel(self.chosen):
                return scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)

        return Prepared(run)


class SdpaFlash(Sdpa):
    """FlashAttention 2, as torch ships it."""

    key, name, chosen = "sdpa-flash", "SDPA flash", SDPBackend.FLASH_ATTENTION


class SdpaCudnn(Sdpa):
    """cuDNN, as torch calls it."""

    key, name, chosen = "sdpa-cudnn", "SDPA cuDNN", SDPBackend.CUDNN_ATTENTION


class FlashAttention3(Peer):
    """FlashAttention 3: dense causal and windows; it has no way to add sinks."""

    key, name = "fa3", "FlashAttention 3"
    package, module = "fa3-fwd", "fa3_fwd_interface"

    def expresses(self, pattern: Pattern) -> bool:
        return not pattern.sink and not pattern.last

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        from fa3_fwd_interface import flash_attn_func

        q, k, v = turn(tensors)
        window = (-1, -1) if case.pattern.window is None else (case.pattern.window - 1, 0)
        return Prepared(lambda: flash_attn_func(q, k, v, causal=True, window_size=window),
                        blhd=True)


def all_peers() -> list[Peer]:
    """Every kernel that is known, ours first, in the order of the table."""
    from benchmarks.peer_cudnn import CudnnFlex
    from benchmarks.peer_fa4 import FlashAttention4
    from benchmarks.peer_flex import FlexDefault, FlexTuned
    from benchmarks.peer_fsa import FlashSparse

    return [Ours(), Portable(), FlashAttention3(), FlashAttention4(), CudnnFlex(),
            FlashSparse(), FlexDefault(), FlexTuned(), SdpaFlash(), SdpaCudnn()]


def choose_peers(keys: list[str]) -> list[Peer]:
    """The peers of these keys (none: all of them), ours first; ValueError for an unknown key."""
    peers = all_peers()
    unknown = set(keys) - {peer.key for peer in peers}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such peer; there are "
                         f"{', '.join(peer.key for peer in peers)}")
    return [peer for peer in peers if not keys or peer.key in keys or peer.key == Ours.key]
