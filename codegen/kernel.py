"""Launching: from tensors to one call of the emitted kernel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit import emit_kernels, emit_lister, merge_lists
from maskdsl.codegen.emit_scores import score_arguments, score_parameters
from maskdsl.codegen.hopper import HopperForward, refuse_call
from maskdsl.codegen.hopper_cut import HopperConfig, refuse_mask
from maskdsl.codegen.listing import Parameter
from maskdsl.codegen.lists import group_heads, parameters, shared_rows
from maskdsl.codegen.plan import Plan
from maskdsl.codegen.planner import make_plan, mean_row_width
from maskdsl.codegen.tables import CHUNK, CallPlan, Tables, head_table
from maskdsl.codegen.tune import Config, pick_config
from maskdsl.errors import BackendError, DeviceError, DtypeError, ResourceError
from maskdsl.expr import Mask
from maskdsl.scores import ScoreMod, SinkLogits
from maskdsl.settings import debug, debug_level
from maskdsl.shape import Shape
from maskdsl.spans import spans

LOG2_E = 1.4426950408889634
LEAST_SCALE = 1e-30  # for 0, which would make NaN of a dead pair's -inf; scores vanish as well


def interpreting() -> bool:
    """Whether Triton runs in its interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def can_launch() -> bool:
    """Whether there is a GPU, or the interpreter in its place."""
    return interpreting() or torch.cuda.is_available()


@lru_cache(maxsize=16)
def arch_of(device: torch.device) -> str:
    """The chip's name as `tune` spells it."""
    if device.type == "cpu":
        return "cpu"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation: what Triton compiles separately.

    plans     one, or one for each kind of head, costliest first
    heads     the query heads that walk each plan; () where all walk the only one
    listers   for each plan with tables of blocks, the function that lists its tiles
    """

    plans: tuple[Plan, ...]
    heads: tuple[tuple[int, ...], ...]
    config: Config
    forward: Any  # the JIT function
    constants: dict[str, Any]
    listers: tuple[Any, ...]

    @property
    def parameters(self) -> list[Parameter]:
        """The arguments beyond those of every mask."""
        found = [*parameters(merge_lists(self.plans)), *score_parameters(self.plans[0].scores)]
        return [*found, Parameter("head_order", True)] if self.heads else found


class TritonForward:
    """The forward kernels of one mask. One compiled kernel serves every length, batch and head
    count; only dtype, head sizes, and whether tensors are aligned make another."""

    def __init__(self, mask: Mask, config: Config | None = None, *,
                 scores: tuple[ScoreMod, ...] = (), hopper: bool = False,
                 must: bool = False) -> None:
        """hopper: take the Hopper kernel where a call allows; must: raise where it does not."""
        if not can_launch():
            raise BackendError(f"backend={'hopper' if hopper else 'triton'!r}",
                               "there is no GPU here",
                               "backend='torch', or TRITON_INTERPRET=1 to test on a CPU")
        self.mask, self.scores = mask, scores
        self.kinds = sorted(group_heads(mask), key=lambda kind: -mean_row_width(kind[1]))
        for _, one in self.kinds:
            spans(one)  # a function that cannot be compiled is told now, not at the first call
        self.chosen = config.check() if config else None
        self.variants: dict[tuple[Any, ...], Variant] = {}
        self.hopper = HopperForward(mask) if hopper else None
        self.must = must

    def refuse_hopper(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
        """Why the portable kernel runs such a call; "" where the Hopper kernel does."""
        if self.hopper is None:
            return "backend='triton' is the portable kernel"
        if not arch_of(q.device).startswith("sm_9"):
            return f"{arch_of(q.device)} is no Hopper GPU"
        if self.chosen is not None:
            return "a tile was chosen, which only the portable kernel takes"
        if self.scores:
            return "scores are modified, which only the portable kernel does"
        fits = all(fits_tma(t, live_strides(t)) for t in (q, k, v))
        return refuse_mask(self.mask, self.must) or refuse_call(self.mask, q, v, fits)

    @cached_property
    def width(self) -> float:
        """Mean live keys per row, for the choice of tiles."""
        return mean_row_width(self.kinds[0][1])

    def config(self, arch: str, head_dim: int, value_dim: int, item_size: int) -> Config:
        """The tile sizes in use: the user's, or the tuned ones."""
        return self.chosen or pick_config(arch, head_dim, value_dim, item_size, self.width,
                                          shared_rows(self.mask))

    def default_config(self, head_dim: int) -> Config:
        """The config for two-byte elements on the current device."""
        device = torch.device("cpu" if interpreting() else "cuda")
        return self.config(arch_of(device), head_dim, head_dim, 2)

    def default_plans(self, head_dim: int) -> tuple[Plan, ...]:
        """The plans for two-byte elements on the current device, costliest heads first."""
        return self._plans(self.default_config(head_dim))

    def _plans(self, config: Config) -> tuple[Plan, ...]:
        plans = (make_plan(mask, config.block_m, config.block_n) for _, mask in self.kinds)
        return tuple(replace(plan, scores=self.scores) if self.scores else plan for plan in plans)

    def variant(self, arch: str, dtype: torch.dtype, head_dim: int, value_dim: int, align: int,
                use_tma: bool, with_lse: bool, config: Config | None = None) -> Variant:
        """The specialisation for these properties, built on first use; config None: `config()`."""
        key = (arch, dtype, head_dim, value_dim, align, use_tma, with_lse, config)
        if key not in self.variants:
            start = time.perf_counter()
            config = config or self.config(arch, head_dim, value_dim, dtype.itemsize)
            self.variants[key] = self._build(config, kernel_constants(
                config, dtype, head_dim, value_dim, align, use_tma, with_lse))
            debug(1, f"{self.mask!r} for {arch}, {dtype}, D {head_dim}/{value_dim}: {config}")
            debug(2, f"planned and written in {1e3 * (time.perf_counter() - start):.1f} ms")
        return self.variants[key]

    def _build(self, config: Config, constants: dict[str, Any]) -> Variant:
        plans = self._plans(config)
        heads = tuple(heads for heads, _ in self.kinds if heads)
        module = load_module(emit_kernels(plans, tuple(map(len, heads))))
        listers = tuple(load_module(emit_lister(plan)).list_tiles if plan.lists.tables else None
                        for plan in plans)
        return Variant(plans, heads, config, module.forward, constants, listers)

    def prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape,
                scale: float, layout: str, with_lse: bool,
                setting: Config | HopperConfig | None = None) -> Call:
        """A function of (q, k, v, data) for every call that looks like this one.

        q, k, v are [B, H, L, D] views, already checked; the function takes them in the user's
        layout. All that a warm call need not decide again is decided here. The class of a setting
        names the kernel; None: the first kernel that takes the call, in its default setting.
        """
        check_device(q)
        make_out = output_maker(q, v.shape[3], layout, with_lse)
        if not q.numel() or not shape.kv_len:
            sinks = [mod.name for mod in self.scores if isinstance(mod, SinkLogits)]
            return lambda q, k, v, data: without_keys(
                make_out(q), data[sinks[0]] if sinks else None)
        return self._prepare_launch(q, k, v, shape, scale, make_out, with_lse, setting)

    def _prepare_launch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape,
                        scale: float, make_out: OutputMaker, with_lse: bool,
                        setting: Config | HopperConfig | None) -> Call:
        refused = self.refuse_hopper(q, k, v)
        if self.must and refused:
            raise BackendError("backend='hopper'", refused, "leave backend out: the portable "
                               "kernel takes the call then")
        if self.hopper is not None and not refused and not isinstance(setting, Config):
            return self.hopper.prepare(q, k, v, shape, max(scale, LEAST_SCALE) * LOG2_E, make_out,
                                       with_lse, setting)
        assert not isinstance(setting, HopperConfig), "a Hopper setting for the portable kernel"
        strides = [live_strides(t) for t in (q, k, v, make_out(q)[1])]
        align = common_alignment(strides)
        use_tma = fits_tma(k, strides[1]) and fits_tma(v, strides[2])
        chosen = self.variant(arch_of(q.device), q.dtype, q.shape[3], v.shape[3], align, use_tma,
                              with_lse, setting)
        config, constants = chosen.config, chosen.constants
        if debug_level() >= 2:
            for plan in chosen.plans:
                full, masked = plan.count_tiles(shape)
                debug(2, f"{shape}: {full} full and {masked} masked tiles a head, without lists")
        batch, heads = q.shape[0], q.shape[1]
        grid = (-(-shape.q_len // config.block_m) * batch * heads,)
        numbers = (*(s // align for three in strides for s in three),
                   batch * heads, heads, heads // k.shape[1],
                   shape.q_len, shape.kv_len, shape.q_offset, shape.total_len)
        if not self.scores:  # modified scores are scaled by themselves, in natural units
            scale = max(scale, LEAST_SCALE) * LOG2_E
        found = chosen.parameters
        options = {**constants, "num_warps": config.warps, "num_stages": config.stages}
        launch, device = chosen.forward[grid], q.device.index
        keys = describe(k, strides[1], config.block_n, constants["QK_BLOCK"]) if use_tma else None
        values = describe(v, strides[2], config.block_n, constants["V_BLOCK"]) if use_tma else None

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 data: dict[str, Any]) -> Result:
            result, out, lse = make_out(q)
            more = slot_arguments(chosen, found, data, shape, heads, q, k, v) if found else ()
            arguments = (q, k if keys is None else rebase(keys, k),
                         v if values is None else rebase(values, v), out,
                         out if lse is None else lse, *numbers, *more, scale)
            try:
                if device is None or device == torch.cuda.current_device():
                    launch(*arguments, **options)
                else:
                    with torch.cuda.device(device):
                        launch(*arguments, **options)
            except OutOfResources as error:
                raise ResourceError(f"{config}", f"the kernel does not fit the device: {error}",
                                    "a smaller tile, or leave tile out") from error
            return result

        return call


Result = Any  # output, or (output, lse)
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], Result]
OutputMaker = Callable[[torch.Tensor], tuple[Result, torch.Tensor, torch.Tensor | None]]


def slot_arguments(chosen: Variant, found: list[Parameter], data: dict[str, Any], shape: Shape,
                   heads: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Any]:
    """The arguments that carry call-time data, in the order the kernel takes them.

    heads  query heads; q, k, v are in the user's layout, whose second dimension may be length
    """
    lists, config = merge_lists(chosen.plans), chosen.config
    by_head = bool(chosen.heads) or any(plan.lists.by_head for plan in chosen.plans)
    tables = Tables(CallPlan(lists, shape, q.shape[0], heads, (config.block_m, config.block_n),
                             by_head), data)
    if lists.tables:
        tables.room_for_tiles()
        for i, lister in enumerate(chosen.listers):
            if lister is not None:
                list_tiles(chosen, i, lister, tables, q.device)
    everything = tables.arguments | {"union_key_rows": k, "union_value_rows": v}
    if scores := chosen.plans[0].scores:
        everything |= score_arguments(scores, data, heads, q.device)
    if chosen.heads:
        everything["head_order"] = head_table(sum(chosen.heads, ()), q.device)
    return [everything[p.name] for p in found]


def list_tiles(chosen: Variant, i: int, lister: Any, tables: Tables, device: torch.device) -> None:
    """Run one plan's lister for all query tiles of its heads."""
    call, plan = tables.call, chosen.plans[i]
    share = tables.arguments["union_tile_share"]
    heads = chosen.heads[i] if chosen.heads else tuple(range(0, call.heads, share))
    batch = tables.arguments["union_tile_list"].shape[0]
    tiles = -(-call.shape.q_len // plan.block_m)
    names = [p.name for p in parameters(plan.lists)
             if p.name.startswith(("slot_", "union_tile_"))]
    shape = call.shape
    lister[(tiles * len(heads) * batch,)](
        head_table(heads, device), len(heads), shape.q_len, shape.kv_len, shape.q_offset,
        shape.total_len, *(tables.arguments[name] for name in names),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, CHUNK=CHUNK)


def output_maker(q: torch.Tensor, value_dim: int, layout: str, with_lse: bool) -> OutputMaker:
    """Allocates what a call returns: (result, output as [B, H, L, Dv], lse or None)."""
    b, h, n, _ = q.shape
    size = (b, n, h, value_dim) if layout == "blhd" else (b, h, n, value_dim)
    turned = layout == "blhd"

    def make(q: torch.Tensor) -> tuple[Result, torch.Tensor, torch.Tensor | None]:
        out = q.new_empty(size)
        view = out.transpose(1, 2) if turned else out
        if not with_lse:
            return out, view, None
        lse = torch.empty((b, h, n), dtype=torch.float32, device=q.device)
        return (out, lse), view, lse

    return make


def without_keys(made: tuple[Result, torch.Tensor, torch.Tensor | None],
                 sinks: torch.Tensor | None = None) -> Result:
    """The result where no row has a key: 0, and -inf or the head's sink logit."""
    result, out, lse = made
    out.zero_()
    if lse is not None:
        lse.copy_(lse.new_tensor(float("-inf")) if sinks is None else sinks[:, None])
    return result


def kernel_constants(config: Config, dtype: torch.dtype, head_dim: int, value_dim: int,
                     align: int, use_tma: bool, with_lse: bool) -> dict[str, Any]:
    """The constexpr arguments of `forward`."""
    return {
        "HEAD_DIM": head_dim, "VALUE_DIM": value_dim,
        "QK_BLOCK": triton.next_power_of_2(head_dim), "V_BLOCK": triton.next_power_of_2(value_dim),
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "STAGES": config.stages,
        "ALIGN": align, "USE_TMA": use_tma, "WITH_LSE": with_lse,
        # float32 inputs mean float32 precision: TF32 would lose 13 bits in silence
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def check_device(q: torch.Tensor) -> None:
    """Refuse tensors and dtypes the kernel cannot run on."""
    if not q.is_cuda and not interpreting():
        raise DeviceError(f"tensors on {q.device} with backend='triton'",
                          "a Triton kernel needs tensors on a GPU",
                          "q.cuda() and so on, or compile(..., backend='torch')")
    if interpreting() and q.dtype == torch.bfloat16:
        raise DtypeError("bfloat16 tensors under TRITON_INTERPRET=1",
                         "the interpreter's bfloat16 dot product is silently wrong",
                         "float16 or float32 tensors, or backend='torch'")


def live_strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and length in elements; 0 where the dimension has one entry."""
    b, h, n, _ = t.shape
    sb, sh, sl, _ = t.stride()
    return sb if b > 1 else 0, sh if h > 1 else 0, sl if n > 1 else 0


def common_alignment(strides: list[tuple[int, int, int]]) -> int:
    """The largest of 16, 8, 1 elements that divides every stride."""
    flat = [s for three in strides for s in three]
    return next(a for a in (16, 8, 1) if all(s % a == 0 for s in flat))


def fits_tma(t: torch.Tensor, strides: tuple[int, int, int]) -> bool:
    """Whether the hardware can copy tiles of `t`: Hopper or later, a 16-byte aligned base and
    strides, no stride 0."""
    arch, size = arch_of(t.device), t.element_size()
    if not arch.startswith("sm_") or int(arch[3:]) < 90:
        return False
    if t.data_ptr() % 16 or any(s * size % 16 for s in strides):
        return False
    return all(s or n == 1 for s, n in zip(strides, t.shape[:3], strict=True))


def describe(t: torch.Tensor, strides: tuple[int, int, int], rows: int, block: int) -> Any:
    """A TMA descriptor of k or v with tiles of [1, 1, rows, block]; out of bounds reads give 0.

    A template for `rebase`: it is kept for later calls, so it must not keep this tensor alive.
    """
    row = 16 * -(-t.shape[3] // 16)  # any legal stride, for dimensions of one entry
    steps = [s or row for s in strides]
    descriptor = TensorDescriptor(t, list(t.shape), [*steps, 1], [1, 1, rows, block])
    descriptor.base = None
    return descriptor


def rebase(descriptor: Any, t: torch.Tensor) -> Any:
    """The descriptor over a tensor of the shape and strides it was made for.

    A copy: its fields were validated once, and validating costs more than the rest of a warm call.
    """
    fresh = object.__new__(type(descriptor))
    fresh.__dict__.update(descriptor.__dict__)
    fresh.base = t
    return fresh
