"""The Hopper kernels, forward and backward, run whole on the CPU: numbers, races, deadlocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_machine import Deadlock, Kernel, load_kernel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import masks, shapes

from maskdsl import (
    BlockDiagonal,
    Causal,
    Chunk,
    Empty,
    FirstQ,
    Full,
    LastQ,
    Mask,
    PerHead,
    RandomBlocks,
    Shape,
    Sink,
    Stride,
    Where,
    Window,
    dense,
    simplify,
)
from maskdsl.codegen import hopper, hopper_backward, hopper_onepass
from maskdsl.codegen.hopper import HopperForward
from maskdsl.codegen.hopper_cut import pick_hopper, refuse_dims, refuse_mask
from maskdsl.codegen.kernel import LOG2_E, output_maker
from maskdsl.dense import dense_attention

TRIANGLE = Sink(8) | Window(70) | LastQ(40)
SHOWN = (AssertionError, Deadlock)  # how the emulator tells of a fault
CHANGES: dict[str, str] = {}  # text of the emitted file, and what a test puts in its place


def load(source: str, name: str, seed: int) -> Kernel:
    for text, other in CHANGES.items():
        if text not in source:
            raise ValueError(f"no such line: {text}")
        source = source.replace(text, other)
    kernel = load_kernel(source, name)
    kernel.seed = seed
    return kernel


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches run on the emulator, on two multiprocessors; returns where the seed is set."""
    state = SimpleNamespace(seed=0)

    monkeypatch.setattr(hopper, "load_module", lambda source: SimpleNamespace(
        forward=load(source, "forward", state.seed)))
    monkeypatch.setattr(hopper_backward, "kernel_of",
                        lambda side: load(side.source, "gradients", state.seed))
    monkeypatch.setattr(hopper_onepass, "kernel_of",
                        lambda side: load(side.source, "gradients", state.seed))
    for module in (hopper, hopper_backward):
        monkeypatch.setattr(module, "queue",
                            lambda _, items=0: torch.zeros(3 + items, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(multi_processor_count=2))
    yield state
    CHANGES.clear()


def for_seeds(machine: Any, count: int, check: Callable[[], None]) -> None:
    """One check under so many schedules."""
    for seed in range(count):
        machine.seed = seed
        check()


def draw(sizes: tuple[int, int, int], shape: Shape, dim: int, dtype: torch.dtype,
         value_dim: int = 0) -> list[torch.Tensor]:
    """q, k, v and an output's gradient; sizes: batch, query heads, key/value heads."""
    generator = torch.Generator().manual_seed(7)
    batch, heads, kv_heads = sizes
    return [torch.randn(batch, h, n, d, generator=generator).to(dtype) for h, n, d in (
        (heads, shape.q_len, dim), (kv_heads, shape.kv_len, dim),
        (kv_heads, shape.kv_len, value_dim or dim), (heads, shape.q_len, value_dim or dim))]


def check_forward(mask: Mask, shape: Shape, sizes: tuple[int, int, int] = (1, 4, 1), dim: int = 64,
                  dtype: torch.dtype = torch.float16, value_dim: int = 0, **changes: Any) -> None:
    """Output to the rounding of its dtype, lse to that of float32; dead rows 0 and -inf.

    changes  of the config
    """
    whole, value_dim = simplify(mask), value_dim or dim
    assert not refuse_mask(whole, by_name=True) and not refuse_dims(dim, value_dim)
    q, k, v, _ = draw(sizes, shape, dim, dtype, value_dim)
    config = replace(pick_hopper(whole, sizes[1] // sizes[2], dim, value_dim), **changes)
    call = HopperForward(whole).prepare(
        q, k, v, shape, dim**-0.5 * LOG2_E, output_maker(q, value_dim, "bhld", True), True, config)
    out, lse = call(q, k, v, {})
    live = dense(whole, shape, sizes[0], sizes[1], "cpu", {})
    exact, exact_lse = dense_attention(q.double(), k.double(), v.double(), live)
    torch.testing.assert_close(lse.double(), exact_lse, atol=4e-6, rtol=0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, atol=2 * eps, rtol=2 * eps)


def check_backward(mask: Mask, shape: Shape, sizes: tuple[int, int, int] = (1, 4, 1),
                   dim: int = 64, dtype: torch.dtype = torch.float16,
                   deterministic: bool = True) -> None:
    """Gradients of output and lse against float64 autograd."""
    whole = simplify(mask)
    q, k, v, grad = draw(sizes, shape, dim, dtype)
    grad_lse = torch.randn(*q.shape[:3], generator=torch.Generator().manual_seed(8))
    live = dense(whole, shape, sizes[0], sizes[1], "cpu", {})
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    out, lse = dense_attention(exact[0], exact[1], exact[2], live)
    seen = (out * grad.double()).sum() + \
        (torch.where(lse == -torch.inf, 0.0, lse) * grad_lse.double()).sum()
    expected = [t.nan_to_num() for t in torch.autograd.grad(seen, exact)]
    kernels = hopper_backward.HopperBackward(whole, sizes[1] // sizes[2])
    call: Any = SimpleNamespace(shape=shape, scale=dim**-0.5, deterministic=deterministic)
    found = kernels.run(call, (q, k, v, out.detach().to(dtype), lse.detach().float()), grad,
                        grad_lse, (True, True), {}, frozenset())
    eps = torch.finfo(dtype).eps
    for made, right in zip(found, expected, strict=True):
        assert made is not None
        allowed = 4 * eps * max(1.0, right.abs().max().item())
        assert (made.double() - right).abs().max().item() <= allowed
        assert not made.double()[right == 0].any()


@pytest.mark.parametrize("seed", [0, 1, 2])  # early, mixed and late copies and products
@pytest.mark.parametrize(("mask", "shape", "sizes", "dim"), [
    (Causal() & TRIANGLE, Shape(330, 330), (1, 4, 1), 64),
    (Causal(), Shape(300, 460), (1, 2, 2), 128),
    (Causal() & (Chunk(192) | Sink(3)), Shape(100, 500, 300, 700), (2, 6, 3), 64)], ids=repr)
def test_forward(on_machine: Any, seed: int, mask: Mask, shape: Shape,
                 sizes: tuple[int, int, int], dim: int) -> None:
    on_machine.seed = seed
    check_forward(mask, shape, sizes, dim)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("mask", "dims", "changes"), [
    (Causal() & TRIANGLE, (64, 64), {"k_slots": 2, "v_slots": 2}),
    (Causal(), (128, 128), {"k_slots": 3, "v_slots": 2}),
    (Causal() & TRIANGLE, (64, 64), {"computing": 3}), (Causal(), (64, 40), {}),
    (Causal() & TRIANGLE, (128, 128), {"letters": 1, "k_slots": 3, "v_slots": 2}),
    (Causal() & Stride(64), (128, 64), {"letters": 1})], ids=repr)
def test_forward_with_other_configs(on_machine: Any, seed: int, mask: Mask, dims: tuple[int, int],
                                    changes: dict[str, int]) -> None:
    """Other numbers of slots; one place for the queries of an item; three groups that compute."""
    on_machine.seed = seed
    check_forward(mask, Shape(330, 400), (1, 4, 1), dims[0], value_dim=dims[1], **changes)


def test_forward_of_other_sizes(on_machine: Any) -> None:
    """bfloat16, values narrower than queries, per-head masks, heavy rows cut along their keys."""
    check_forward(Causal() & TRIANGLE, Shape(200, 200), (1, 2, 1), 72, torch.bfloat16, 40)
    check_forward(Causal() & Where(lambda b, h, q, k: q - k < 30 * (h + 1)), Shape(150, 150))
    check_forward(Empty(), Shape(70, 70))
    check_forward(Causal() & (Sink(8) | Window(64) | LastQ(32)), Shape(2000, 2000), (1, 1, 1))


@pytest.mark.parametrize(("mask", "dims"), [
    (Causal() & TRIANGLE, (256, 256)), (Causal() & TRIANGLE, (192, 128)),
    (Causal() & TRIANGLE, (96, 96)), (Causal() & Window(100), (192, 192)),
    (Causal() & PerHead([Window(200)] * 2 + [TRIANGLE] * 2), (128, 128)),
    (Causal() & PerHead([Sink(8), Window(30), TRIANGLE, Empty()]), (256, 256)),
    (Causal() & Stride(64), (64, 64)), (RandomBlocks(64, 2) | Window(20), (128, 128)),
    (Causal() & Where(lambda b, h, q, k: (k % 100 < 9) & (q >= 40 * h)), (256, 256))], ids=repr)
def test_forward_by_name(on_machine: Any, mask: Mask, dims: tuple[int, int]) -> None:
    """Large heads, kinds of heads, masks with dead tiles inside their intervals."""
    on_machine.seed = sum(dims)
    check_forward(mask, Shape(330, 460), (1, 4, 1), dims[0], value_dim=dims[1])


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(masks(), shapes(max_len=300), st.integers(0, 99))
def test_forward_of_random_masks(on_machine: Any, mask: Mask, shape: Shape, seed: int) -> None:
    on_machine.seed = seed
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if not refuse_mask(simplify(mask), by_name=True) and shape.q_len and shape.kv_len and \
            max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_forward(mask, shape)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("mask", "shape", "sizes", "dim"), [
    (Causal() & TRIANGLE, Shape(330, 330), (1, 4, 1), 64),
    (Causal(), Shape(150, 260), (1, 2, 2), 128),
    (Causal() & TRIANGLE, Shape(200, 200), (1, 4, 1), 128),
    (Causal() & Window(7), Shape(200, 140), (2, 6, 2), 64)], ids=repr)
def test_backward(on_machine: Any, seed: int, mask: Mask, shape: Shape,
                  sizes: tuple[int, int, int], dim: int) -> None:
    on_machine.seed = seed
    check_backward(mask, shape, sizes, dim)


def test_backward_of_other_masks(on_machine: Any) -> None:
    check_backward(Full(), Shape(100, 170), dtype=torch.bfloat16)
    check_backward(Window(50, 30) | FirstQ(5) | Sink(3), Shape(190, 190), (1, 3, 1))
    check_backward(BlockDiagonal([70, 90, 40]), Shape(200, 200), (1, 2, 1))
    check_backward(Causal() & (Sink(8) | Window(64) | LastQ(32)), Shape(1200, 1200), (1, 1, 1))


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(masks(), shapes(max_len=200), st.integers(0, 99), st.sampled_from([64, 128]))
def test_backward_of_random_masks(on_machine: Any, mask: Mask, shape: Shape, seed: int,
                                  dim: int) -> None:
    on_machine.seed = seed
    limit = min((x for m in mask.walk() if (x := m.limit()) is not None), default=1 << 60)
    if not hopper_backward.refuse_mask(simplify(mask)) and shape.q_len and shape.kv_len and \
            max(shape.q_offset + shape.q_len, shape.kv_len) <= limit:
        check_backward(mask, shape, dim=dim)


PRODUCT = "acc = half_products(right, v_s, v_slot, acc, 1, V_PARTS, BLOCK_N)"
HAND_BACK = "release(V_FREE, v_slot)"


@pytest.mark.parametrize("change", [  # of lines of the loop over tiles, and of the output's store
    {"mbarrier.wait(v_full.index(v_slot), v_phase)": "pass"},  # values not there yet
    {"release(K_FREE, k_slot)": "pass"},  # never handed back
    {"s = warpgroup_mma_wait(2 * V_PARTS, deps=[s])": "pass"},  # scores not there yet
    {"    fence_async_shared()": "    pass"},  # the copy engine may not see what threads stored
    # a slot handed back before the product that reads it is done
    {HAND_BACK: "pass", PRODUCT: f"{PRODUCT}; {HAND_BACK}"}], ids=str)
def test_faults_show(on_machine: Any, change: dict[str, str]) -> None:
    """The emulator finds what it is there to find."""
    for line, other in change.items():
        CHANGES[f"\n            {line}\n"] = f"\n            {other}\n"
    with pytest.raises(SHOWN):
        for_seeds(on_machine, 6, lambda: check_forward(Causal(), Shape(700, 700), (1, 2, 1)))


@pytest.mark.parametrize("change", [
    # lse and delta of this step in the next
    {"gl.where(n + 1 < end, slot, now)": "now"},
    # own rows not there yet, or results written over before they have left
    {"mbarrier.wait(own_full.index(own), turn)": "pass"},
    {f"{' ' * 16}tma.store_wait(0)\n": ""},
    # the numbers of a step not there yet, or written over
    {"mbarrier.init(c_full.index(i), count=2)": "mbarrier.init(c_full.index(i), count=1)"},
    {"mbarrier.init(empty.index(i), count=2)": "mbarrier.init(empty.index(i), count=1)"}], ids=str)
def test_faults_of_the_backward_show(on_machine: Any, change: dict[str, str]) -> None:
    CHANGES.update(change)
    with pytest.raises(SHOWN):
        for_seeds(on_machine, 12, lambda: check_backward(Full(), Shape(600, 400), (1, 4, 1), 128))
