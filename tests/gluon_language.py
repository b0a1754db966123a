"""The names an emitted Gluon file uses, for `gluon_machine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
from gluon_machine import Barrier, Descriptor, Machine, Product, Program, line_of
from gluon_tensors import NUMPY, Pointer, Shared, Tensor, elementwise, lift, pair, real
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier


class Holder:
    """The machine of the launch in progress."""

    machine: Machine


def truth(x: Any) -> bool:
    return bool(lift(x).data)


def unary(function: Callable[[Any], Any]) -> Callable[[Any], Tensor]:
    def run(x: Any) -> Tensor:
        x = lift(x)
        with np.errstate(all="ignore"):
            return Tensor(function(x.data), x.dtype, x.layout)
    return run


def reduction(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(x: Tensor, axis: int) -> Tensor:
        with np.errstate(all="ignore"):
            return Tensor(function(x.data, axis=axis), x.dtype)
    return run


def where(condition: Any, a: Any, b: Any) -> Tensor:
    x, y, dtype, layout = pair(a, b)
    return Tensor(np.where(lift(condition).data, x, y), dtype, layout)


def umulhi(a: Tensor, b: Tensor) -> Tensor:
    product = a.data.astype(np.uint64) * b.data.astype(np.uint64)
    return Tensor(product >> np.uint64(32), real.uint32)


def scan(x: Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> Tensor:
    """Running sums; no kernel combines otherwise."""
    assert int(combine(lift(3), lift(4))) == 7, "a scan that does not add"
    return Tensor(np.cumsum(x.data, axis=axis), x.dtype, x.layout)


def count(start: Any, stop: Any = None, step: int = 1) -> Iterator[Any]:
    """`range`, whose numbers are tensors as in a kernel."""
    if stop is None:
        start, stop = 0, start
    for i in range(int(start), int(stop), step):
        yield Tensor(i, real.int32)


def convert(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    return Tensor(x.data, x.dtype, layout)


def below(word: Tensor) -> Any:
    return ((np.int64(1) << np.clip(word.data.astype(np.int64), 0, 32)) - 1).astype(np.uint32) \
        .view(np.int32)


def assembler(holder: Holder) -> Callable[..., Tensor]:
    """The few machine instructions that kernels write out."""
    def run(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool,
            pack: int) -> Tensor:
        if text.startswith("bar."):
            kind, name, threads = text[4:].partition(";")[0].replace(",", " ").split()
            if name == "$1":
                name = str(int(lift(args[0]).data.reshape(-1)[0]))
            assert int(name) in range(4, 16), f"barrier {name} is Triton's own"
            wait_named(holder.machine, kind, name, threads)
            return args[0]
        if "setp.lt.f32" in text:  # arrives at a barrier where a sum of weights is negative
            assert not (args[0].data < 0).any(), "a negative sum of weights"
            return args[0]
        if "mul.f32" in text:
            # a thread's numbers, then the same registers as operands, then the factors
            assert all(f"mul.f32 ${i}, ${i}, ${2 * pack + i};" in text for i in range(pack))
            assert constraints.split(",")[pack:2 * pack] == [str(i) for i in range(pack)]
            return times_factors(*args)
        if text.startswith("mov.b32"):
            first = lift(args[0])
            shape = np.broadcast_shapes(*(lift(x).data.shape for x in args))
            return Tensor(np.broadcast_to(first.data, shape), first.dtype, first.layout)
        if text.startswith("bmsk.clamp.b32"):
            word = lift(args[0])
            return Tensor(below(word), dtype, word.layout)
        if text.startswith("popc.b32"):
            bits = lift(args[0]).data.astype(np.int64) & 0xFFFFFFFF
            return Tensor(np.vectorize(lambda w: int(w).bit_count())(bits), dtype)
        if text.startswith("shf.r.wrap.b32"):
            low, high, shift = (lift(x).data.astype(np.int64) & 0xFFFFFFFF for x in args)
            word = ((low | high << 32) >> (shift & 31)) & 0xFFFFFFFF
            return Tensor(word.astype(np.uint32).view(np.int32), dtype)
        raise AssertionError(f"an instruction nobody taught the emulator: {text}")
    return run


def times_factors(numbers: Tensor, factors: Tensor) -> Tensor:
    """The numbers of 64 rows times the factor of their row; those of a warp's 16 rows stay as they
    are where all factors are 1."""
    whole = np.broadcast_to(factors.data, numbers.data.shape).reshape(4, 16, -1)
    changed = (whole != 1).any(axis=(1, 2), keepdims=True)
    product = numbers.data.reshape(whole.shape) * np.where(changed, whole, 1)
    return Tensor(product.reshape(numbers.data.shape), numbers.dtype, numbers.layout)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """`split`: the last axis, of two, taken apart."""
    assert x.data.shape[-1] == 2
    return Tensor(x.data[..., 0], x.dtype), Tensor(x.data[..., 1], x.dtype)


def broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = np.broadcast_shapes(a.data.shape, b.data.shape)
    return (Tensor(np.broadcast_to(a.data, shape), a.dtype, a.layout),
            Tensor(np.broadcast_to(b.data, shape), b.dtype, b.layout))


def wait_named(machine: Machine, kind: str, name: str, threads: str) -> None:
    """A hardware barrier: `arrive` goes on, `sync` waits for the others."""
    group = machine.me()
    state = group.program.named.setdefault(name, [0, 0])  # threads there, rounds completed
    machine.pause()
    round_now = state[1]
    stores = group.program.stores_before.setdefault((name, round_now), [])
    stores += group.unfenced
    state[0] += 32 * group.warps
    assert state[0] <= int(threads), f"barrier {name} has more threads than it waits for"
    if state[0] == int(threads):
        state[0], state[1] = 0, state[1] + 1
    if kind == "sync":
        machine.pause(lambda: state[1] > round_now, f"barrier {name}; {line_of()}")
        group.seen += stores


def specialize(holder: Holder) -> Callable[..., None]:
    def run(functions: list[Any], warps: list[int], registers: list[int]) -> None:
        machine = holder.machine
        me = machine.me()
        assert sum(warps) + me.warps <= 16 and len(warps) == len(functions) - 1
        others = [machine.start(me.program, f.__name__, w, lambda f=f, a=a: f(*a))
                  for (f, a), w in zip(functions[1:], warps, strict=True)]
        function, arguments = functions[0]
        me.name = function.__name__
        function(*arguments)
        machine.pause(lambda: all(g.ended for g in others), "the end of the other warp groups")
    return run


def barriers(holder: Holder) -> SimpleNamespace:
    def of(bar: Shared) -> Barrier:
        return bar.machine.barriers[bar.base]  # type: ignore[no-any-return]

    def init(bar: Shared, count: int) -> None:
        bar.machine.barriers[bar.base] = Barrier(count)

    def expect(bar: Shared, nbytes: int, pred: Any = True) -> None:
        if truth(pred):
            of(bar).change(1, nbytes)
        holder.machine.pause()

    def arrive(bar: Shared, count: int = 1, pred: Any = True) -> None:
        if truth(pred):
            of(bar).change(count, 0)
        holder.machine.pause()

    def wait(bar: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if truth(pred):
            parity, found = int(phase), of(bar)
            assert parity in (0, 1), "a phase is 0 or 1"
            holder.machine.pause(lambda: found.phase & 1 != parity,
                                 f"phase {parity}, {found.missing} arrivals and {found.bytes} "
                                 f"bytes missing; {line_of()}")

    return SimpleNamespace(init=init, expect=expect, arrive=arrive, wait=wait,
                           MBarrierLayout=real_mbarrier.MBarrierLayout)


def copies(holder: Holder) -> SimpleNamespace:
    def load(desc: Descriptor, place: list[Any], bar: Shared, target: Shared,
             pred: Any = True) -> None:
        if not truth(pred):
            return
        assert int(np.prod(target.shape)) == int(np.prod(desc.shape)) and \
            target.layout.swizzle_byte_width == desc.layout.swizzle_byte_width, "another box"
        place, signal = [int(x) for x in place], bar.machine.barriers[bar.base]

        def carry_out() -> None:
            target.write(desc.load(place))
            signal.change(0, -desc.nbytes)

        holder.machine.copies.append(carry_out)
        holder.machine.pause()

    def store(desc: Descriptor, place: list[Any], source: Shared) -> None:
        source.machine.check_fenced(source)
        assert list(source.shape) == desc.shape and \
            source.layout.swizzle_byte_width == desc.layout.swizzle_byte_width, "another box"
        place, group = [int(x) for x in place], holder.machine.me()
        group.stores.append(lambda: desc.store(place, source.read()))
        holder.machine.pause()

    def store_wait(left: int) -> None:
        group = holder.machine.me()
        while len(group.stores) > left:
            group.stores.pop(0)()

    return SimpleNamespace(async_copy_global_to_shared=load, async_copy_shared_to_global=store,
                           store_wait=store_wait)


def products(holder: Holder) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def mma(a: Any, b: Shared, acc: Tensor, use_acc: Any = True, is_async: bool = False) -> Product:
        group = holder.machine.me()
        for x in (a, b):
            if isinstance(x, Shared):
                x.machine.check_fenced(x)
        rows, inner, columns = a_shape(a)[0], a_shape(a)[1], a_shape(b)[1]
        assert a_shape(b)[0] == inner and acc.shape == [rows, columns], "shapes of a product"
        made = Product(group, a, b, acc, truth(use_acc))
        group.products.append(made)
        if not is_async:
            wait(0, [made])
        holder.machine.pause()
        return made

    def wait(left: int = 0, deps: list[Any] | None = None) -> Any:
        group = holder.machine.me()
        assert deps, "a wait says for what"
        while len(group.products) > left:
            group.products.pop(0).carry_out()
        late = set(map(id, group.products))
        for x in deps:
            if isinstance(x, Product) and id(x) not in late and x.found is not None:
                x.waited = True
        holder.machine.pause()
        return deps[0] if len(deps) == 1 else tuple(deps)

    return mma, wait


def a_shape(x: Any) -> list[int]:
    """Rows and columns of an operand."""
    shape = list(x.shape)
    return shape[::-1] if isinstance(x, Shared) and x.turned else shape


def fence(holder: Holder) -> Callable[[], None]:
    def run() -> None:
        me = holder.machine.me()
        me.unfenced.clear()
        # a fence may also stand behind the barrier, with the group that reads
        for group in holder.machine.groups:
            group.unfenced[:] = [store for store in group.unfenced if store not in me.seen]
        me.seen.clear()
    return run


def names_for() -> dict[str, Any]:
    """What an emitted file imports, and `machine`, which the launcher fills in."""
    holder = Holder()

    def program() -> Program:
        return holder.machine.me().program

    def jit(function: Any = None, **options: Any) -> Any:
        return function if function is not None else jit

    gl = SimpleNamespace(
        constexpr=lambda x: x, static_range=range, to_tensor=lift, program_id=lambda axis: Tensor(
            program().number, real.int32),
        num_programs=lambda axis=0: Tensor(program().grid, real.int32),  # type: ignore[attr-defined]
        num_warps=lambda: holder.machine.me().warps, umulhi=umulhi, where=where,
        maximum=elementwise(np.fmax), minimum=elementwise(np.fmin), max=reduction(np.max),
        sum=reduction(np.sum), min=reduction(np.min), exp2=unary(np.exp2), log2=unary(np.log2),
        exp=unary(np.exp), log=unary(np.log),
        arange=lambda a, b, layout=None: Tensor(np.arange(a, b), real.int32, layout),
        full=lambda shape, x, dtype, layout=None: Tensor(
            np.full([int(n) for n in shape], lift(x).data.astype(NUMPY[dtype])), dtype, layout),
        zeros=lambda shape, dtype, layout=None: Tensor(np.zeros(shape), dtype, layout),
        expand_dims=lambda x, axis: Tensor(np.expand_dims(x.data, axis), x.dtype,
                                           getattr(x.layout, "parent", None)),
        convert_layout=convert, cast=lambda x, dtype: lift(x).to(dtype),
        associative_scan=scan, store=store,
        load=lambda p, mask=True, other=0, cache_modifier="": p.load(mask, other),
        atomic_add=atomic_add(holder), inline_asm_elementwise=assembler(holder),
        allocate_shared_memory=lambda dtype, shape, layout: program().allocate(
            dtype, shape, layout),
        thread_barrier=lambda: None, split=halves, broadcast=broadcast,
        join=lambda a, b: Tensor(np.stack((a.data, b.data), -1), a.dtype),
        permute=lambda x, order: Tensor(np.transpose(x.data, order), x.dtype),
        cdiv=lambda a, b: (a + b - 1) // b,
        warp_specialize=specialize(holder),
        **{name: getattr(real, name) for name in (
            "int1", "int32", "int64", "uint32", "float32", "float16", "bfloat16", "BlockedLayout",
            "SliceLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "DotOperandLayout",
            "DistributedLinearLayout", "SwizzledSharedLayout")})
    mma, wait = products(holder)
    return {"gl": gl, "gluon": SimpleNamespace(jit=jit, constexpr_function=on_host),
            "mbarrier": barriers(holder),
            "tma": copies(holder), "warpgroup_mma": mma, "warpgroup_mma_wait": wait,
            "fence_async_shared": fence(holder), "range": count, "machine": holder}


def on_host(function: Any) -> Any:
    """A function of the host, where numbers are Python's."""
    return FunctionType(function.__code__, {**function.__globals__, "range": range})


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    pointer.store(value, mask)


def atomic_add(holder: Holder) -> Callable[..., Tensor]:
    def run(pointer: Pointer, value: Any, mask: Any = True, sem: str = "") -> Tensor:
        holder.machine.pause(idle=sem == "acquire")
        return pointer.add(value, mask)
    return run
