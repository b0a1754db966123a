"""The whole Hopper kernel of static masks, warp group by warp group, on the CPU: large heads, kinds
of heads, periodic masks."""

from __future__ import annotations

import pytest
import torch
from gluon_launch import launch_on_threads

from maskdsl import (
    Causal,
    LastQ,
    Mask,
    PerHead,
    RandomBlocks,
    Shape,
    Sink,
    Where,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen.hopper import HopperForward
from maskdsl.codegen.hopper_cut import refuse_dims, refuse_mask
from maskdsl.codegen.kernel import LOG2_E, output_maker
from maskdsl.dense import dense_attention

TRIANGLE = Sink(8) | Window(70) | LastQ(40)


@pytest.mark.parametrize(("mask", "dims"), [
    (TRIANGLE, (64, 64)), (TRIANGLE, (256, 256)), (TRIANGLE, (192, 128)), (TRIANGLE, (96, 96)),
    (Window(100), (192, 192)), (PerHead([Window(200)] * 2 + [TRIANGLE] * 2), (128, 128)),
    (PerHead([Sink(8), Window(30), TRIANGLE, Window(300)]), (256, 256)),
    (RandomBlocks(64, 2) | Window(20), (128, 128)),
    (Where(lambda b, h, q, k: (k % 100 < 9) & (q >= 40 * h)) | Sink(3), (256, 256))], ids=repr)
def test_values_and_lse(mask: Mask, dims: tuple[int, int],
                        monkeypatch: pytest.MonkeyPatch) -> None:
    launch_on_threads(monkeypatch)
    whole, shape = simplify(Causal() & mask), Shape(330, 460)
    assert not refuse_mask(whole, by_name=True) and not refuse_dims(*dims, by_name=True)
    dim, value_dim = dims
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, n, d, generator=generator).half() for h, n, d in (
        (4, shape.q_len, dim), (1, shape.kv_len, dim), (1, shape.kv_len, value_dim)))
    call = HopperForward(whole, by_name=True).prepare(
        q, k, v, shape, dim**-0.5 * LOG2_E, output_maker(q, value_dim, "bhld", True), True)
    out, lse = call(q, k, v, {})
    live = dense(whole, shape, 1, 4, "cpu")
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), live)
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-6, rtol=0)
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=1e-3)
