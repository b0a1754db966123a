"""Runs an emitted file of the Hopper backward on the CPU: a thread for each warp group.

Numbers are float64, so what comes out is exact but for their rounding. Shared memory begins as NaN;
products read it when they are waited for, and results leave their slots as late as the kernel
allows, so a slot that is handed back too early shows. See `gluon_threads`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from gluon_names import Pointer, language, tensor
from gluon_threads import (
    HELPERS,
    Barriers,
    Descriptor,
    Failed,
    Group,
    Letter,
    Machine,
    Product,
    Ring,
    names_for,
    value_of,
)

CONSTANTS = ("BY_KEY", "ADDS", "OWN_HEADS", "OWN_SPAN", "PASS_HEADS", "TILE", "GRAIN", "SLOTS")


class Tile:
    """64 rows in shared memory as an operand, read when the product runs; or its columns."""

    def __init__(self, memory: Any, place: int, columns: slice = slice(None)) -> None:
        self.memory, self.place, self.columns, self.turned = memory, place, columns, False

    def permute(self, order: Any) -> Tile:
        made = Tile(self.memory, self.place, self.columns)
        made.turned = True
        return made

    def __call__(self) -> Any:
        found = np.array(self.memory[self.place][:, self.columns])
        return found.T if self.turned else found

    def store(self, data: Any) -> None:
        self.memory[self.place] = np.asarray(data)


class Own:
    """Slots of 64 own rows; results are staged in them."""

    def __init__(self, slots: int, dim: int) -> None:
        self.shape, self.dtype = [slots, 1, 1, 64, dim], "half"
        self.memory = np.full((slots, 64, dim), np.nan)

    def index(self, slot: Any) -> OwnSlot:
        return OwnSlot(self, int(slot))


class OwnSlot(Tile):
    """One slot of own rows."""

    kind = "own"

    def __init__(self, ring: Own, place: int) -> None:
        super().__init__(ring.memory, place)
        self.ring = SimpleNamespace(write=lambda kind, at, data: self.store(data))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if len(shape) != 3:
            return self
        return SimpleNamespace(index=lambda part: Tile(
            self.memory, self.place, slice(64 * part, 64 * part + 64)))


class Passing(Ring):
    """Slots of 64 passing rows, in halves of 64 columns and grains of 32 rows."""

    def read_tile(self, slot: int) -> Tile:
        view = self

        class Whole:
            def __getitem__(self, place: int) -> Any:
                return view.read(place, 64)

        return Tile(Whole(), slot)


class Numbers:
    """Rows of float numbers in shared memory."""

    def __init__(self, slots: int) -> None:
        self.rows = np.full((slots, 64), np.nan)

    def index(self, slot: Any) -> Any:
        def store(x: Any) -> None:
            self.rows[int(slot)] = x

        return SimpleNamespace(store=store, load=lambda layout: tensor(self.rows[int(slot)].copy()))


class Chained(Group):
    """Products in flight, which may add to one another."""

    def mma(self, a: Any, b: Any, acc: Any, use_acc: bool = True,
            is_async: bool = True) -> Product:
        made = Product(a, b, acc if use_acc else None)
        self.flying.append(made)
        return made

    def wait(self, left: int, deps: list[Any]) -> Any:
        for p in self.flying[:len(self.flying) - left]:
            p.acc = None if p.acc is None else value_of(p.acc)
            super().wait(len(self.flying) - 1, [])
        return super().wait(left, deps)


class Rendezvous:
    """A hardware barrier of two warp groups."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.count = machine, 0

    def __call__(self) -> None:
        with self.machine.lock:
            self.count += 1
            mine = (self.count + 1) // 2 * 2
            self.machine.lock.notify_all()
        self.machine.until(lambda: self.count >= mine, "both warp groups")


def run_gradients(source: str, constants: dict[str, Any], tiled: list[Any], pointers: list[Any],
                  numbers: list[Any], seed: int) -> None:
    """One program walks all items.

    tiled     (float64 array [B, H, L, D], box) of a, b, c, d, their grains and the two results,
              which are written
    pointers  lse, delta, two arrays of parts, sums: flat float64
    numbers   items .. scale, as the launcher passes them
    """
    machine, dim = Machine(), tiled[0][1][3]
    descriptors = [Descriptor(data, box) for data, box in tiled]
    slots = constants["SLOTS"]
    rings = [Own(4, dim), Own(4, dim), Passing(slots, 64, dim), Passing(slots, 64, dim)]
    counts = {"own_full": (4, 1), "own_empty": (4, 1), "c_full": (slots, 2), "d_full": (slots, 1),
              "empty": (slots, 2), "mail_full": (2, 1), "mail_empty": (2, 3)}
    bars = []
    for name, (n, count) in counts.items():
        bars.append(Barriers(machine, name, n))
        for bar in bars[-1].all:
            bar.count = count
    mail, marks = Letters(2, 32), Letters(slots, 32)
    lse_s, delta_s = Numbers(slots), Numbers(slots)
    slopes = np.full((4, 64, 64), np.nan)
    staged = SimpleNamespace(index=lambda i: Tile(slopes, int(i)))
    (items, tiles, batch_groups, groups, section, first, count, splits, share, members, heads,
     *lengths, scale_log2, scale) = numbers
    lse, delta, part, more, sums = map(Pointer, pointers)
    queue = Pointer(np.zeros(2, dtype=np.int64))
    tail = [constants[name] for name in CONSTANTS]
    both = Rendezvous(machine)
    computing = ("consume", *descriptors[6:], lse, delta, part, more, sums, staged, *rings, *bars,
                 mail, marks, lse_s, delta_s, items, batch_groups, groups, first, count, heads,
                 *lengths, scale_log2, scale, *tail)
    work = [("produce", *descriptors[:6], lse, delta, *rings, *bars, mail, marks, lse_s, delta_s,
             items, share, members, heads, lengths[0], lengths[2], *tail),
            (*computing, 0), (*computing, 1),
            ("hand_out", *bars[5:], mail, queue, items, tiles, batch_groups, groups, section,
             first, count, splits, members, *lengths, *tail)]
    run_threads(machine, work, lambda: names_of(source, machine, both), seed)


class Letters:
    """Letters in shared memory."""

    def __init__(self, count: int, size: int) -> None:
        self.all = [Letter(size) for _ in range(count)]

    def index(self, i: Any) -> Letter:
        return self.all[int(i)]


def names_of(source: str, machine: Machine, both: Rendezvous) -> dict[str, Any]:
    """The file's functions for one warp group."""
    group, leaving = Chained(), []
    names = names_for(machine, group, None, None)  # type: ignore[arg-type]

    def write_out(desc: Descriptor, place: list[Any], slot: OwnSlot) -> None:
        def carry_out() -> None:
            shape = desc.block_type.shape
            block = slot.memory[slot.place].reshape(shape)
            inside = [slice(int(at), min(int(at) + n, end)) for at, n, end in
                      zip(place, shape, desc.data.shape, strict=True)]
            sizes = [max(s.stop - s.start, 0) for s in inside]
            if all(sizes):
                desc.data[tuple(inside)] = block[tuple(slice(0, n) for n in sizes)]

        leaving.append(carry_out)

    def store_wait(left: int) -> None:
        while len(leaving) > left:
            leaving.pop(0)()

    def add(pointer: Pointer, value: Any, mask: Any = True, sem: str = "") -> Any:
        with machine.lock:
            if not np.ndim(pointer.place):
                old = int(pointer.memory[pointer.place])
                pointer.memory[pointer.place] = old + value
                return old
            place, value, keep = np.broadcast_arrays(pointer.place, np.asarray(value), mask)
            assert ((place >= 0) & (place < len(pointer.memory)))[keep].all(), "out of bounds"
            np.add.at(pointer.memory, place[keep], value[keep])
            return None

    names["tma"].async_copy_shared_to_global, names["tma"].store_wait = write_out, store_wait
    gl = language(machine.lock, 1)
    gl.NVMMASharedLayout = names["gl"].NVMMASharedLayout
    gl.atomic_add = add
    names |= {"gl": gl, "warpgroup_mma": group.mma, "warpgroup_mma_wait": group.wait}
    text = source[source.index("FAR = "):].replace("@gluon.jit\n", "")
    exec(text[:text.index("@gluon.jit(do_not")].replace(".to(gl.int64)", ""), names)
    names |= {"below": HELPERS["below"], "word_of": HELPERS["word_of"], "settle": lambda x: x,
              "both_wait": both, "matrix_of": lambda ring, slot: ring.read_tile(int(slot))
              if isinstance(ring, Passing) else ring.index(slot)}
    return names


def run_threads(machine: Machine, work: list[tuple[Any, ...]],
                make: Callable[[], dict[str, Any]], seed: int) -> None:
    """Run each function of the file on a thread of its own; raise what the first to fail raised."""
    failures: list[BaseException] = []

    def start(name: str, *args: Any) -> None:
        try:
            with np.errstate(all="ignore"):
                make()[name](*args)
        except Failed:
            pass
        except BaseException as error:  # told by the caller's thread
            failures.append(error)
            with machine.lock:
                machine.dead = True
                machine.lock.notify_all()

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
