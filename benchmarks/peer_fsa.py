"""flash-sparse-attn: Triton kernels with sinks and a window in their own arguments."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from benchmarks.cases import Case, Pattern
from benchmarks.peers import Peer, Prepared, Tensors, turn

TUNED_FROM = 32768  # tokens

# The names its projections import from triton_kernels, a package it does not declare and whose
# namesake on the package index is another one. Attention never calls them.
UNDECLARED = {"triton_kernels": (), "triton_kernels.matmul_ogs": (
    "matmul_ogs", "PrecisionConfig", "FlexCtx"),
    "triton_kernels.numerics": ("InFlexData", "OutFlexData")}


@contextmanager
def stand_in() -> Iterator[None]:
    """Let `import triton_kernels...` succeed in the block, where the real package is not there."""
    try:
        importlib.import_module("triton_kernels.matmul_ogs")
    except ImportError:
        pass
    else:
        yield
        return

    def unavailable(*_: Any, **__: Any) -> Any:
        raise ImportError("triton_kernels is not installed")

    before = {name: sys.modules.get(name) for name in UNDECLARED}
    for name, members in UNDECLARED.items():
        module = ModuleType(name)
        module.__path__ = []
        for member in members:
            setattr(module, member, unavailable)
        sys.modules[name] = module
    try:
        yield
    finally:  # others may look for the real one
        for name, module_before in before.items():
            del sys.modules[name]
            if module_before is not None:
                sys.modules[name] = module_before


class FlashSparse(Peer):
    """`flash_dense_attn_func` with window_sizes [sink, distant, gap, near] of each key/value head.

    It has no last queries: they take a second, dense call whose rows replace those of the first.
    Its tuner tries dozens of tiles for the first call of a kind, which takes minutes (`--limit`);
    short calls, which only check the result, are not tuned.
    """

    key, name = "fsa", "flash-sparse-attn"
    package, module = "flash-sparse-attn", "flash_sparse_attn"

    def missing(self) -> str:
        # it writes its tuned settings into its own folder, which may not be writable
        os.environ.setdefault("FLASH_SPARSE_ATTENTION_LAUNCH_CONFIG_DIR",
                              tempfile.mkdtemp(prefix="flash_sparse_attn_"))
        with stand_in():
            return super().missing()

    def expresses(self, pattern: Pattern) -> bool:
        return True

    def ready(self, case: Case, tensors: Tensors, deadline: float) -> Prepared:
        from flash_sparse_attn import flash_dense_attn_func

        q, k, v = turn(tensors)
        pattern = case.pattern
        tune = {"is_causal": True, "is_autotune": case.length >= TUNED_FROM}
        if pattern.window is None:
            return Prepared(lambda: flash_dense_attn_func(q, k, v, **tune), blhd=True)
        sizes = torch.tensor([[pattern.sink, 0, 0, pattern.window]] * case.kv_heads,
                             dtype=torch.int32, device=q.device)

        def near() -> torch.Tensor:
            out: torch.Tensor = flash_dense_attn_func(q, k, v, window_sizes=sizes, **tune)
            return out

        if not pattern.last:
            return Prepared(near, blhd=True)
        rows = q[:, -pattern.last:].contiguous()

        def both() -> torch.Tensor:
            out = near()
            out[:, -pattern.last:] = flash_dense_attn_func(rows, k, v, **tune)
            return out

        return Prepared(both, blhd=True, settings="two calls: the last queries dense")
