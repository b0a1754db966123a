"""Every allocation of a forward and a backward pass, counted: beyond inputs, output and gradients
there are the lse and delta, and nothing of queries times keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Case, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import maskdsl
from maskdsl import LastQ, Sink, Window
from maskdsl.codegen.kernel import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")
TRIANGLE = Sink(4) | Window(20) | LastQ(10)
OPTIONS = {"backend": "triton", "tile": (16, 16)}
ROW_NUMBERS = 4 * 2 * 64  # bytes of a float32 for each of 64 rows of 2 heads


class Allocations(TorchDispatchMode):
    """The bytes of every storage that is made, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.places: list[int] = []
        self.kept: list[torch.Tensor] = []  # so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs))
                 if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or not t.untyped_storage().nbytes():
                continue
            if t.untyped_storage().data_ptr() not in known:
                self.bytes.append(t.untyped_storage().nbytes())
                self.places.append(t.untyped_storage().data_ptr())
                self.kept.append(t)
        return out


@pytest.mark.parametrize("wanted", ["qkv", "q", "kv"])
def test_allocations(wanted: str) -> None:
    leaves = make_inputs(Case(TRIANGLE, 64, 64, 1, 2, 1, 16), "cpu")
    for name, t in zip("qkv", leaves, strict=True):
        t.requires_grad_(name in wanted)
    attn = maskdsl.compile(TRIANGLE, **OPTIONS)
    attn(*leaves).sum().backward()  # what is made once is made
    for t in leaves:
        t.grad = None
    with Allocations() as forward:
        out = attn(*leaves)
    assert sorted(forward.bytes) == sorted((out.nbytes, ROW_NUMBERS))
    grad = torch.ones_like(out)
    with Allocations() as backward:
        out.backward(grad)
    grads = [t for t in leaves if t.requires_grad]
    assert sorted(backward.bytes) == sorted((*(t.nbytes for t in grads), ROW_NUMBERS))
    for t in grads:  # handed on, not copied
        assert t.grad is not None and t.grad.untyped_storage().data_ptr() in backward.places


def test_a_gradient_of_another_layout_costs_nothing_more() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(Case(TRIANGLE, 64, 64, 1, 2, 1, 16), "cpu")]
    out = maskdsl.compile(TRIANGLE, **OPTIONS)(*leaves)
    grad = torch.ones_like(out).transpose(1, 2).contiguous().transpose(1, 2)
    with Allocations() as made:
        torch.autograd.grad(out, leaves, grad)
    assert sum(made.bytes) == sum(t.nbytes for t in leaves) + ROW_NUMBERS
