"""Runs an emitted Gluon attention kernel on the CPU: a thread for each warp group, real numbers.

Shared memory, mbarriers and their phases, letters and named barriers are kept; layouts are not.
Products are computed when they are waited for, as late as the kernel allows, and copies arrive late
and in any order (seeded), so a slot that is handed back too early shows in the numbers. Blocked
threads end in an error, not in a hang.
"""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from gluon_names import Pointer, language, tensor

PATIENCE = 20.0  # seconds a warp group may wait


class Failed(Exception):
    """Another warp group failed."""


class Machine:
    """What the warp groups of one program share."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.dead = self.done = False
        self.copies: list[Any] = []
        self.turns = {"9": 0, "10": 0}

    def copy_all(self, seed: int) -> None:
        """The copy engine: takes any waiting copy, now and then after a pause."""
        chance = random.Random(seed)
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.copies or self.done or self.dead)
                if not self.copies:
                    return
                copy = self.copies.pop(chance.randrange(len(self.copies)))
            if chance.random() < 0.2:
                time.sleep(chance.random() * 0.002)
            copy()

    def until(self, ready: Any, what: str) -> None:
        with self.lock:
            if not self.lock.wait_for(lambda: self.dead or ready(), PATIENCE):
                self.dead = True
                self.lock.notify_all()
                raise TimeoutError(f"blocked: {what}")
            if self.dead:
                raise Failed(what)


class Barrier:
    """An mbarrier: arrivals of a phase, and bytes that are still to come."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.count = self.arrived = self.pending = self.phase = 0

    def change(self, arrivals: int, by: int) -> None:
        with self.machine.lock:
            self.arrived += arrivals
            self.pending += by
            assert self.arrived <= self.count, f"{self.name}: too many arrivals"
            if self.arrived == self.count and not self.pending:
                self.arrived, self.phase = 0, self.phase + 1
            self.machine.lock.notify_all()

    def wait(self, phase: int) -> None:
        self.machine.until(lambda: self.phase & 1 != phase & 1, f"{self.name} phase {phase}")


class Barriers:
    def __init__(self, machine: Machine, name: str, count: int) -> None:
        self.all = [Barrier(machine, f"{name}[{i}]") for i in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Slot:
    """One slot, or one grain, of a ring; output is staged in a slot of queries."""

    def __init__(self, ring: Ring, kind: str, place: int) -> None:
        self.ring, self.kind, self.place = ring, kind, place
        self.staged: Any = None

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Slot:
        return self

    def store(self, data: Any) -> None:
        self.staged = np.asarray(data)
        self.ring.memory[self.place] = np.nan  # what was there is gone


class Ring:
    """Slots of keys or values: memory in grains of [32, 64]; a tile of n rows has its halves n / 32
    grains apart."""

    def __init__(self, slots: int, rows: int, dim: int) -> None:
        self.shape = [slots, 1, 1, rows, dim]
        self.dtype = "half"
        self.halves, self.tile = dim // 64, rows // 32
        self.memory = np.full((slots * self.halves * self.tile, 32, 64), np.nan)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        return SimpleNamespace(shape=shape, index=lambda place: Slot(self, "grain", int(place)))

    def index(self, slot: Any) -> Slot:
        return Slot(self, "slot", int(slot))

    def write(self, kind: str, place: int, data: Any) -> None:
        """data: [rows, width]"""
        if kind == "grain":
            self.memory[place] = data
            return
        first = place * self.halves * self.tile
        for h in range(self.halves):
            for j in range(self.tile):
                self.memory[first + h * self.tile + j] = \
                    data[32 * j:32 * j + 32, 64 * h:64 * h + 64]

    def read(self, slot: int, rows: int) -> Any:
        first, grains = slot * self.halves * self.tile, rows // 32
        return np.concatenate([self.memory[first + h * grains:first + (h + 1) * grains]
                               .reshape(rows, 64) for h in range(self.halves)], 1)


class Queries(Ring):
    """Slots of 64 query rows."""

    def __init__(self, dim: int, heads: int) -> None:
        self.shape, self.dtype = [4, 1, heads, 64 // heads, dim], "half"
        self.memory = np.full((4, 64, dim), np.nan)

    def write(self, kind: str, place: int, data: Any) -> None:
        self.memory[place] = data

    def read(self, slot: int, rows: int) -> Any:
        return self.memory[slot]


class Descriptor:
    """A TMA descriptor: reads beyond the ends give 0, writes there are dropped."""

    def __init__(self, data: Any, block: tuple[int, ...]) -> None:
        self.data, self.dtype, self.layout = data, "half", None
        self.block_type = SimpleNamespace(shape=list(block), nbytes=int(np.prod(block)) * 2)

    def load(self, place: list[Any]) -> Any:
        inside, there = [], np.ones((), dtype=bool)
        for start, size, length in zip(map(int, place), self.block_type.shape, self.data.shape,
                                       strict=True):
            at = np.arange(start, start + size)
            there = there[..., None] & ((at >= 0) & (at < length))
            inside.append(np.clip(at, 0, max(length - 1, 0)))
        block = np.where(there, self.data[np.ix_(*inside)], 0.0)
        return block.reshape(-1, block.shape[-1])


class Product:
    """A product in flight."""

    def __init__(self, a: Any, b: Any, acc: Any) -> None:
        self.a, self.b, self.acc, self.value = a, b, acc, None


def value_of(x: Any) -> Any:
    if isinstance(x, Product):
        assert x.value is not None, "a product is read before it is waited for"
        return x.value
    return x


class Group:
    """What one warp group has in flight."""

    def __init__(self) -> None:
        self.flying: list[Product] = []

    def mma(self, a: Any, b: Any, acc: Any, use_acc: bool = True,
            is_async: bool = True) -> Product:
        made = Product(a, b, value_of(acc) if use_acc else None)
        self.flying.append(made)
        return made

    def wait(self, left: int, deps: list[Any]) -> Any:
        while len(self.flying) > left:
            p = self.flying.pop(0)
            a = p.a() if callable(p.a) else np.asarray(p.a)
            p.value = tensor(a @ p.b() if p.acc is None else np.asarray(p.acc) + a @ p.b())
        found = [value_of(x) for x in deps]
        return found[0] if len(found) == 1 else tuple(found)


class Matrix:
    """A tile in shared memory as an operand, read when the product runs."""

    def __init__(self, ring: Ring, slot: Any, rows: int) -> None:
        self.ring, self.slot, self.rows, self.turned = ring, int(slot), rows, False

    def permute(self, order: Any) -> Matrix:
        made = Matrix(self.ring, self.slot, self.rows)
        made.turned = True
        return made

    def __call__(self) -> Any:
        found = self.ring.read(self.slot, self.rows)
        return found.T if self.turned else found


class Letter:
    """A letter in shared memory."""

    def __init__(self, size: int) -> None:
        self.words = np.zeros(size, dtype=np.int64)

    def store(self, text: Any) -> None:
        self.words[:] = text

    def slice(self, i: int, n: int) -> Any:
        return SimpleNamespace(load=lambda layout: int(self.words[i]))


HELPERS = {
    "below": lambda bound: (np.int64(1) << np.clip(bound, 0, 32)) - 1,
    "count_bits": lambda word: np.vectorize(lambda w: int(w & 0xFFFFFFFF).bit_count())(word),
    "funnel": lambda near, far, shift:
        (((near & 0xFFFFFFFF) | ((far & 0xFFFFFFFF) << 32)) >> shift) & 0xFFFFFFFF,
    "divide": lambda a, divisor, _: a // divisor,
    "word_of": lambda letter, i: int(letter.words[i]),
}


def run_forward(source: str, constants: dict[str, Any], descriptors: list[Descriptor],
                out: Any, lse: Any, numbers: list[Any], more: list[Any], scale: float,
                seed: int) -> None:
    """One program walks all items: `forward` of the file on numpy data.

    descriptors  in the file's order, without the output's; out float64[B, H, L, Dv], lse flat
    numbers      items .. group, then dividers as (divisor, 0), then the four lengths
    """
    c, machine = constants, Machine()
    dim, value_dim = descriptors[1].block_type.shape[3], descriptors[2].block_type.shape[3]
    heads = max(c["HEADS_PACKED"] // 2, 1)
    q_s, k_s, v_s = Queries(dim, heads), Ring(c["K_SLOTS"], c["BLOCK_N"], dim), \
        Ring(c["V_SLOTS"], c["BLOCK_N"], value_dim)
    sizes = {"q_full": (4, 1), "q_empty": (4, 1), "k_full": (c["K_SLOTS"], 1),
             "k_empty": (c["K_SLOTS"], 2), "v_full": (c["V_SLOTS"], 1),
             "v_empty": (c["V_SLOTS"], 2), "mail_full": (2, 1), "mail_empty": (2, 3)}
    bars = {name: Barriers(machine, name, n) for name, (n, _) in sizes.items()}
    for name, (_, count) in sizes.items():
        for bar in bars[name].all:
            bar.count = count
    letters = [Letter(64), Letter(64)]
    mail = SimpleNamespace(index=lambda i: letters[int(i)])
    queue, failures = Pointer(np.zeros(2, dtype=np.int64)), []
    out_desc = SimpleNamespace(layout=None)
    tail = [c[n] for n in ("HEADS_PACKED", "SPAN", "NARROW", "BLOCK_N", "GRAIN", "K_SLOTS",
                           "V_SLOTS", "WITH_LSE")]
    b = [bars[name] for name in sizes]
    items, _, batch_groups, groups, _, first, count, _, kv_group = numbers[:9]
    lengths = numbers[15:19]
    nothing = Pointer(np.zeros(1))
    columns = descriptors[5:]

    def make(group: Group) -> dict[str, Any]:
        names = names_for(machine, group, out, q_s)
        text = source[source.index("FAR = "):].replace("@gluon.jit\n", "")
        exec(text[:text.index("@gluon.jit(do_not")].replace(".to(gl.int64)", ""), names)
        names.update(HELPERS)
        names["tile_of"] = lambda ring, slot, rows: Matrix(ring, slot, rows)
        names["named_barrier"] = named(machine)
        names["partial_sum"] = lambda w: tensor(np.asarray(w).sum(1)[:, None])
        return names

    def start(name: str, *args: Any) -> None:
        try:
            with np.errstate(all="ignore"):
                make(Group())[name](*args)
        except Failed:
            pass
        except BaseException as error:  # told by the caller's thread
            failures.append(error)
            with machine.lock:
                machine.dead = True
                machine.lock.notify_all()

    consume = [out_desc, q_s, k_s, v_s, *b, mail, lse, nothing, nothing, items, batch_groups,
               groups, first, count, *lengths, *more, scale, *tail]
    work = [("produce", *descriptors[:5], *columns, q_s, k_s, v_s, *b, mail, items, kv_group,
             *more, *tail),
            ("consume", *consume, 0), ("consume", *consume, 1),
            ("hand_out", *b[6:], mail, queue, *numbers[:8], *numbers[9:15], *lengths, *more,
             *tail)]
    threads = [threading.Thread(target=start, args=w, daemon=True) for w in work]
    engine = threading.Thread(target=machine.copy_all, args=(seed,), daemon=True)
    for t in (*threads, engine):
        t.start()
    for t in threads:
        t.join()
    with machine.lock:
        machine.done = True
        machine.lock.notify_all()
    engine.join()
    if failures:
        raise failures[0]


def named(machine: Machine) -> Any:
    def barrier(kind: str, name: str) -> None:
        """One group arrives, the other waits: a token."""
        if kind == "arrive":
            with machine.lock:
                machine.turns[name] += 1
                machine.lock.notify_all()
            return
        machine.until(lambda: machine.turns[name] > 0, f"turn {name}")
        with machine.lock:
            machine.turns[name] -= 1
    return barrier


def names_for(machine: Machine, group: Group, out: Any, q_s: Queries) -> dict[str, Any]:
    """The names an emitted file imports."""
    def expect(bar: Barrier, nbytes: int, pred: Any = True) -> None:
        bar.change(1, int(nbytes))

    def copy(desc: Descriptor, place: list[Any], bar: Barrier, target: Any) -> None:
        def carry_out() -> None:
            target.ring.write(target.kind, target.place, desc.load(place))
            bar.change(0, -desc.block_type.nbytes)

        with machine.lock:
            machine.copies.append(carry_out)
            machine.lock.notify_all()

    def arrive(bar: Barrier, count: int = 1, pred: Any = True) -> None:
        if pred:
            bar.change(count, 0)

    def wait(bar: Barrier, phase: Any, pred: Any = True) -> None:
        if pred:
            bar.wait(int(phase))

    def write_out(desc: Any, place: list[Any], slot: Slot) -> None:
        batch, head, row, _ = map(int, place)
        data = slot.staged
        block = data.reshape(-1, 64 // (q_s.shape[2]), data.shape[-1])
        rows = min(block.shape[1], out.shape[2] - row)
        if rows > 0:
            out[batch, head:head + len(block), row:row + rows] = block[:, :rows, :out.shape[3]]

    gl = language(machine.lock, 1)
    gl.NVMMASharedLayout = SimpleNamespace(get_default_for=lambda *_: None)
    return {
        "gl": gl, "fence_async_shared": lambda: None,
        "mbarrier": SimpleNamespace(expect=expect, arrive=arrive, wait=wait),
        "tma": SimpleNamespace(async_copy_global_to_shared=copy,
                               async_copy_shared_to_global=write_out, store_wait=lambda _: None),
        "warpgroup_mma": group.mma, "warpgroup_mma_wait": lambda n, deps: group.wait(n, deps)}
