"""Runs an emitted Gluon file on the CPU, with real numbers and hostile schedules.

A thread stands for each warp group; one runs at a time, and at every barrier, copy and product a
seeded draw decides who goes on. Copies by TMA and products in flight are carried out at any moment
between their start and the wait for them, so that a slot handed back too early, a wait left out or
one too many shows in the numbers or as a deadlock. Layouts of registers are not checked here (the
compiler does), layouts of shared memory are (`gluon_tensors`).
"""

from __future__ import annotations

import linecache
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gluon_tensors import (
    TORCH,
    Pointer,
    Shared,
    Tensor,
    bytes_of,
    lift,
    real,
)

SHARED_BYTES = 232448
IDLE_TURNS = 1000  # more looks at counters, by everyone, than any that find something


class Deadlock(Exception):
    """Nobody can go on."""


class Stopped(BaseException):
    """Another warp group failed."""


class Store:
    """Bytes that a thread has stored in shared memory."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end


class Group:
    """A warp group: its thread, what it waits for, and what it has in flight."""

    def __init__(self, program: Program, name: str, warps: int) -> None:
        self.program, self.name, self.warps = program, name, warps
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []
        self.unfenced: list[Store] = []
        self.seen: list[Store] = []  # stores of others, before a barrier at which it waited
        self.ended = self.idle = False


class Product(Tensor):
    """A product in flight, then its value."""

    def __init__(self, group: Group, a: Any, b: Any, acc: Tensor, use_acc: bool) -> None:
        self.group, self.a, self.b, self.acc, self.use_acc = group, a, b, acc, use_acc
        self.dtype, self.layout, self.found, self.waited = acc.dtype, acc.layout, None, False

    @property
    def data(self) -> Any:
        assert self.waited, "a product is read before it is waited for"
        return self.found

    @property
    def shape(self) -> list[int]:
        return self.acc.shape

    def carry_out(self) -> None:
        """Read the operands and multiply."""
        left = self.a.read() if isinstance(self.a, Shared) else self.a.data
        made = np.asarray(left, np.float32) @ np.asarray(self.b.read(), np.float32)
        if self.use_acc:
            acc = self.acc.found if isinstance(self.acc, Product) else self.acc.data
            made = made + acc
        self.found = made
        self.a = self.b = None


class Barrier:
    """An mbarrier: arrivals missing in this phase, and bytes still to come."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def change(self, arrivals: int, more: int) -> None:
        self.missing -= arrivals
        self.bytes += more
        assert self.missing >= 0, "more arrivals than a phase has"
        if not self.missing and not self.bytes:
            self.missing, self.phase = self.count, self.phase + 1


class Program:
    """Shared memory and barriers of one program."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine, self.number, self.used = machine, number, 0
        self.memory = np.full(SHARED_BYTES, 0xFF, np.uint8)  # NaN in every float type
        self.barriers: dict[int, Barrier] = {}
        self.named: dict[str, list[int]] = {}
        self.stores_before: dict[tuple[str, int], list[Store]] = {}  # of a named barrier's round

    def view(self, dtype: Any) -> Any:
        kind = {real.bfloat16: np.uint16, real.float16: np.float16, real.float32: np.float32,
                real.int32: np.int32, real.int64: np.int64}[dtype]
        return self.memory.view(kind)

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        align = 1024 if getattr(layout, "swizzle_byte_width", 0) else 16
        self.used = -(-self.used // align) * align
        made = Shared(self, self.used, dtype, shape, layout)
        self.used += made.nbytes
        assert self.used <= SHARED_BYTES, "shared memory is full"
        return made

    def unfenced(self, start: int, end: int) -> None:
        self.machine.me().unfenced.append(Store(start, end))

    def check_fenced(self, piece: Shared) -> None:
        """What threads stored must be fenced before the copy engine or a product reads it."""
        for group in self.machine.groups:
            if group.program is self:
                for store in group.unfenced:
                    assert store.end <= piece.base or \
                        store.start >= piece.base + piece.nbytes, \
                        f"{group.name}'s stores are read without a fence"


class Machine:
    """All programs of a launch, one warp group running at a time."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        # how soon copies and products are carried out: at once, now and then, or when all wait
        self.eager = [1.0, 0.3, 0.0][seed % 3]
        self.idle_turns = 0  # in which nobody did anything but look
        self.groups: list[Group] = []
        self.copies: list[Callable[[], None]] = []
        self.local = threading.local()
        self.failure: BaseException | None = None
        self.all_done = threading.Semaphore(0)
        self.lock = threading.Lock()  # only for what is not scheduled: ends of threads

    def me(self) -> Group:
        return self.local.group  # type: ignore[no-any-return]

    def start(self, program: Program, name: str, warps: int, run: Callable[[], None]) -> Group:
        group = Group(program, name, warps)

        def body() -> None:
            self.local.group = group
            group.turn.acquire()
            try:
                if self.failure is None:
                    run()
                    self.settle(group)
            except Stopped:
                pass
            except BaseException as error:
                self.failure = self.failure or error
            group.ended = True
            self.pass_on(group)

        self.groups.append(group)
        threading.Thread(target=body, daemon=True).start()
        return group

    def run(self) -> None:
        """Start, and return when every group has ended."""
        self.chance.choice(self.groups).turn.release()
        self.all_done.acquire()
        if self.failure is not None:
            raise self.failure

    def settle(self, group: Group) -> None:
        """The end of a group: nothing may be in flight."""
        assert not group.products, f"{group.name} ends with products in flight"
        assert not group.stores, f"{group.name} ends with copies to global memory in flight"

    def pause(self, ready: Callable[[], bool] = lambda: True, what: str = "",
              idle: bool = False) -> None:
        """Let others go on; return when `ready`; idle: it only looks whether it can go on."""
        group = self.me()
        group.ready, group.waits_for, group.idle = ready, what, idle
        if self.pass_on(group):
            return
        group.turn.acquire()
        if self.failure is not None:
            raise Stopped

    def pass_on(self, me: Group) -> bool:
        """Choose who goes on; True where it is the caller."""
        while True:
            if self.failure is not None:
                return self.stop_all(me)
            ready = [g for g in self.groups if not g.ended and g.ready()]
            waiting = len(self.copies) + sum(bool(g.products) for g in self.groups)
            busy = any(not g.idle for g in ready)
            if waiting and (not busy or self.chance.random() < self.eager):
                self.carry_out_one()
                continue
            self.idle_turns = 0 if busy else self.idle_turns + 1
            if self.idle_turns > IDLE_TURNS:
                self.failure = Deadlock("all that go on wait for a counter")
                continue
            if ready:
                chosen = self.chance.choice(ready)
                if chosen is me:
                    return True
                chosen.turn.release()
                return False
            if all(g.ended for g in self.groups):
                self.all_done.release()
                return False
            self.failure = Deadlock("\n".join(
                f"program {g.program.number} {g.name}: {g.waits_for}" for g in self.groups
                if not g.ended))

    def stop_all(self, me: Group) -> bool:
        """After a failure every thread is woken, once, to end."""
        for group in self.groups:
            if not group.ended and group is not me:
                group.ended = True
                group.turn.release()
        if me.ended:
            self.all_done.release()
            return False
        me.ended = True
        raise Stopped

    def carry_out_one(self) -> None:
        """One copy, or the oldest product of a group."""
        work: list[Callable[[], None]] = []
        if self.copies:
            work.append(lambda: self.copies.pop(self.chance.randrange(len(self.copies)))())
        for group in self.groups:
            if group.products:
                work.append(lambda group=group: group.products.pop(0).carry_out())
        try:
            self.chance.choice(work)()
        except AssertionError as error:
            self.failure = error


class Descriptor:
    """A TMA descriptor: reads beyond the ends give 0, writes there are dropped."""

    def __init__(self, host: Any) -> None:
        self.tensor = host.base.as_strided(host.shape, host.strides, host.base.storage_offset())
        self.dtype, self.layout = TORCH[host.base.dtype], host.layout
        self.block_type = self
        self.shape = [int(n) for n in host.block_shape]
        self.nbytes = int(np.prod(self.shape)) * bytes_of(self.dtype)

    def box(self, place: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the tensor and of the block that a copy at `place` touches."""
        ours, theirs = [], []
        for start, size, length in zip(map(int, place), self.shape, self.tensor.shape,
                                       strict=True):
            low, high = min(max(start, 0), length), max(min(start + size, length), 0)
            theirs.append(slice(low, max(high, low)))
            ours.append(slice(low - start, high - start) if high > low else slice(0, 0))
        return tuple(theirs), tuple(ours)

    def load(self, place: list[Any]) -> Any:
        theirs, ours = self.box(place)
        block = np.zeros(self.shape, np.float32)
        block[ours] = self.tensor[theirs].float().numpy()
        return block

    def store(self, place: list[Any], block: Any) -> None:
        theirs, ours = self.box(place)
        part = torch.from_numpy(np.ascontiguousarray(np.asarray(block, np.float32)[ours]))
        self.tensor[theirs] = part.to(self.tensor.dtype)


class Kernel:
    """A function of an emitted file, launched as a kernel is: kernel[grid](*arguments, ...)."""

    def __init__(self, file: dict[str, Any], name: str, arg_names: list[str]) -> None:
        self.file, self.name, self.arg_names, self.seed = file, name, arg_names, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            machine = self.file["machine"].machine = Machine(self.seed)
            given = [take(x) for x in arguments]
            constants = {k: v for k, v in constants.items() if k in self.arg_names}
            warps = 4
            for number in range(grid[0]):
                program = Program(machine, number)
                program.grid = grid[0]  # type: ignore[attr-defined]
                machine.start(program, "main", warps,
                              lambda: self.file[self.name](*given, **constants))
            machine.run()
        return launch


def take(x: Any) -> Any:
    """An argument of a launch as the kernel sees it."""
    if isinstance(x, torch.Tensor):
        flat = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size()
                                    - x.storage_offset(),), (1,), x.storage_offset())
        return Pointer(flat)
    if isinstance(x, bool | int | float):
        return lift(x)
    return Descriptor(x)


def load_kernel(source: str, name: str) -> Kernel:
    """The kernel `name` of an emitted file, to be run here."""
    from gluon_language import names_for

    file = names_for()
    text = source[source.index("FAR = "):]
    path = f"<emitted {hash(source)}>"
    linecache.cache[path] = (len(text), None, text.splitlines(True), path)
    exec(compile(text, path, "exec"), file)
    function = file[name]
    count = function.__code__.co_argcount
    return Kernel(file, name, list(function.__code__.co_varnames[:count]))


def line_of(depth: int = 2) -> str:
    """Where in the emitted file the caller stands."""
    frame = sys._getframe(depth)
    while frame and not frame.f_code.co_filename.startswith("<emitted"):
        frame = frame.f_back  # type: ignore[assignment]
    if not frame:
        return "?"
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{frame.f_code.co_name}, line {frame.f_lineno}: {text}"
