"""The one-pass Hopper backward, run whole on the CPU: numbers, races, deadlocks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gluon_machine import Deadlock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import masks, shapes
from test_hopper_machine import CHANGES, SHOWN, TRIANGLE, check_backward, for_seeds, on_machine

from maskdsl import BlockDiagonal, Causal, Full, Mask, Shape, Sink, Window, simplify
from maskdsl.codegen import hopper_backward, hopper_onepass
from maskdsl.codegen.emit_hopper_onepass import fits_letter
from maskdsl.codegen.hopper_onepass import OnePass, Sums, pays, size_sums

__all__ = ["on_machine"]
PROCESSORS = 132
HAND_BACK = "mbarrier.arrive(own_empty.index(0), count=1)"
FULL_UNITS = hopper_onepass.size_sums


@pytest.fixture
def one_pass(on_machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every call in one pass, in short segments; the launches run on the emulator."""
    monkeypatch.setattr(hopper_backward, "pays", lambda *_: True)
    monkeypatch.setattr(hopper_onepass, "SEGMENT_ROWS", (256, 256))
    return on_machine


def check(mask: Mask, shape: Shape, sizes: tuple[int, int, int], **more: Any) -> None:
    check_backward(mask, shape, sizes, 128, deterministic=False, **more)


@pytest.mark.parametrize("seed", [0, 1, 2])  # early, mixed and late copies and products
@pytest.mark.parametrize(("mask", "shape", "sizes"), [
    (Causal(), Shape(500, 500), (1, 4, 2)),
    (Full(), Shape(100, 170), (2, 2, 1)),
    (Causal() & TRIANGLE, Shape(330, 330), (1, 3, 1)),
    (Causal(), Shape(70, 400), (1, 2, 2)),
], ids=str)
def test_gradients(one_pass: Any, seed: int, mask: Mask, shape: Shape,
                   sizes: tuple[int, int, int]) -> None:
    one_pass.seed = seed
    check(mask, shape, sizes)


def test_other_masks_and_types(one_pass: Any) -> None:
    check(Full(), Shape(260, 130), (1, 2, 1), dtype=torch.bfloat16)
    check(Window(50, 30) | Sink(3), Shape(290, 290), (1, 1, 1))
    check(BlockDiagonal([70, 90, 140]), Shape(300, 300), (1, 2, 2))
    check(Causal() & ~Sink(300), Shape(400, 400), (1, 2, 2))  # dead keys and dead rows


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture],
          deadline=None)
@given(masks(), shapes(max_len=300), st.integers(0, 99))
def test_random_masks(one_pass: Any, mask: Mask, shape: Shape, seed: int) -> None:
    one_pass.seed = seed
    whole = simplify(mask)
    if not hopper_backward.refuse_mask(whole) and fits_letter(OnePass(whole).by_key) and \
            shape.q_len and shape.kv_len and shape.q_offset + shape.q_len <= 500:
        check(mask, shape, (1, 2, 1))


@pytest.fixture
def crowded(one_pass: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """More programs than items of two segments, and room for no more sums than there must be: who
    adds waits for who rounds."""
    monkeypatch.setattr(hopper_onepass, "SEGMENT_ROWS", (128, 128))
    monkeypatch.setattr(hopper_onepass.Sums, "ring", 2)
    monkeypatch.setattr(hopper_onepass, "size_sums", lambda *a: replace(FULL_UNITS(*a), delay=1))
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(multi_processor_count=9))
    return one_pass


@pytest.mark.parametrize("seed", range(6))
def test_crowded(crowded: Any, seed: int) -> None:
    crowded.seed = seed
    check(Full(), Shape(256, 128), (1, 6, 6))


def test_an_item_not_counted_while_its_program_waits_for_a_letter_is_a_deadlock(
        crowded: Any) -> None:
    CHANGES.update({
        "            if behind > 0:\n": "            if False:\n",
        "            batch = group // groups\n":
            "            if is_keys & (unit >= ring):\n"
            "                wait_count(rounded_ptr + (unit - ring), 2 * chunks)\n"
            "            batch = group // groups\n"})
    with pytest.raises(Deadlock):
        for_seeds(crowded, 6, lambda: check(Full(), Shape(256, 128), (1, 6, 6)))


@pytest.mark.parametrize("change", [
    # nobody waits for what is rounded, or for what is added
    {"            if behind > 0:\n": "            if False:\n"},
    {"            wait_count(done_ptr + unit, 2 * tiles)\n": ""}], ids=lambda x: str(x)[:40])
def test_faults_among_programs_show(crowded: Any, change: dict[str, str]) -> None:
    CHANGES.update(change)
    with pytest.raises(SHOWN):
        for_seeds(crowded, 12, lambda: check(Full(), Shape(256, 128), (1, 6, 6)))


@pytest.mark.parametrize("change", [
    # dS that is not there yet, or written over before it is read
    {f"{' ' * 16}await_other(tick ^ 1, WARP_GROUP)\n": "",
     "                leave(tick, WARP_GROUP)\n": ""},
    # keys handed back before the last product has read them
    {"            # dQ of the last step\n": f"            {HAND_BACK}\n",
     f"            {HAND_BACK}\n            add": "            add"},
    # the sums of dQ a step off
    {"                number = next_number\n": ""},
    {"gl.where(n + 1 < steps, slot, now)": "now"}], ids=lambda x: str(x)[:40])
def test_faults_show(one_pass: Any, change: dict[str, str]) -> None:
    CHANGES.update(change)
    with pytest.raises(SHOWN):
        for_seeds(one_pass, 12, lambda: check(Full(), Shape(300, 300), (1, 2, 1)))


def test_which_calls_it_takes() -> None:
    """Nearly dense masks of long calls, heads of 128."""
    dense, long = OnePass(simplify(Causal())), Shape(32768, 32768)
    assert pays(dense, long, 8, 4, 128, PROCESSORS)
    assert pays(OnePass(simplify(Full())), long, 32, 1, 128, PROCESSORS)
    assert pays(OnePass(simplify(Window(8192))), long, 8, 4, 128, PROCESSORS)
    assert pays(dense, Shape(4096, 4096), 8, 4, 128, PROCESSORS)
    assert not pays(dense, long, 8, 4, 64, PROCESSORS)
    assert not pays(dense, Shape(2048, 2048), 8, 4, 128, PROCESSORS)
    assert not pays(dense, Shape(1 << 20, 1 << 20), 8, 4, 128, PROCESSORS)  # sums of dK and dV
    assert not pays(OnePass(simplify(Window(4096))), long, 8, 4, 128, PROCESSORS)
    assert not pays(OnePass(simplify(Causal() & (Sink(64) | Window(1024)))), long, 8, 4, 128,
                    PROCESSORS)


def test_memory_of_sums() -> None:
    """As docs/compiler.md tells: dQ of eight segments, dK and dV of two heads."""
    sums = size_sums(OnePass(simplify(Causal())), Shape(32768, 32768), 8, 4, PROCESSORS)
    assert (sums.ring, sums.queries * 4 >> 20, sums.keys * 4 >> 20) == (8, 32, 64)
    assert sums == Sums(8, 256, 16, 2048, 4, 3)
    made = Sums(2, 3, 2, 128, 1, 1).make(torch.device("cpu"))
    assert [t.numel() for t in made] == [4 * 128 * 128, 4 * 3 * 128 * 128, 1 + 8 + 2]
    assert made[2].dtype == torch.int32 and all(not t.any() for t in made)


@pytest.mark.parametrize(("deterministic", "switch", "expected"), [
    (False, False, True), (True, False, False), (False, True, False)])
def test_deterministic_calls_take_two_kernels(
        monkeypatch: pytest.MonkeyPatch, deterministic: bool, switch: bool,
        expected: bool) -> None:
    """By the call's option, and by PyTorch's own switch."""
    taken: list[str] = []
    kernels = hopper_backward.HopperBackward(simplify(Causal()), 1)
    monkeypatch.setattr(hopper_backward, "pays", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(multi_processor_count=PROCESSORS))
    for name in ("one_pass", "by_query", "by_key"):
        monkeypatch.setattr(kernels, name, _Taker(name, taken))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: switch)
    q, k, v, out = (torch.zeros(1, 2, 64, 128, dtype=torch.float16) for _ in range(4))
    call: Any = SimpleNamespace(shape=Shape(64, 64), scale=1.0, deterministic=deterministic)
    kernels.run(call, (q, k, v, out, torch.zeros(1, 2, 64)), out, None, (True, True), {},
                frozenset())
    assert taken == (["one_pass"] if expected else ["by_query", "by_key"])


class _Taker:
    """Stands for a kernel: notes that it was launched."""

    side = None

    def __init__(self, name: str, taken: list[str]) -> None:
        self.name, self.taken = name, taken

    def __call__(self, *_: Any) -> None:
        self.taken.append(self.name)
