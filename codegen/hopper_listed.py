"""One call of the Hopper kernel of a mask with call-time data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from maskdsl.codegen.hopper import (
    BY_MAXIMUM,
    HopperForward,
    constants_of,
    describe,
    describe_all,
    launch_numbers,
    queue,
)
from maskdsl.codegen.hopper_cut import GRAIN, ROWS, TILE, HopperConfig
from maskdsl.codegen.hopper_lists import (
    ListedKernels,
    copy_columns,
    heads_told_apart,
    pick_listed,
    schedule_listed,
)
from maskdsl.codegen.kept import nothing
from maskdsl.codegen.planner import make_plan
from maskdsl.shape import Shape

if TYPE_CHECKING:
    from maskdsl.codegen.kernel import Call, OutputMaker

GRAIN_BLOCK = (1, 1, GRAIN, 64)  # what one TMA copy of loose keys brings


class ListedCalls:
    """Calls of one shape; what they have in common is worked out once for each way to pack heads,
    which the lists' heads decide."""

    def __init__(self, forward: HopperForward, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 shape: Shape, with_lse: bool, config: HopperConfig | None) -> None:
        self.forward, self.shape, self.with_lse, self.asked = forward, shape, with_lse, config
        self.batch, self.heads, self.kv_heads = q.shape[0], q.shape[1], k.shape[1]
        self.head_dim = q.shape[3]
        self.processors = torch.cuda.get_device_properties(q.device).multi_processor_count
        self.sizes = [(t.shape, t.stride()) for t in (q, k, v)]
        self.probe = make_plan(forward.mask, ROWS, GRAIN, TILE)
        self.packs: dict[HopperConfig, Pack] = {}
        self.columns: dict[tuple[Any, ...], Any] = {}

    def view(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """q, k and v as [B, H, L, D], whatever the user's layout."""
        return [t.as_strided(*size) for t, size in zip(tensors, self.sizes, strict=True)]

    def pack(self, views: list[torch.Tensor], out: torch.Tensor, data: dict[str, Any]) -> Pack:
        """What calls with data for so many heads have in common."""
        kinds = heads_told_apart(self.probe, data, self.heads)
        group = self.heads // self.kv_heads
        config = self.asked or pick_listed(self.forward.mask, group, self.heads // kinds,
                                           self.head_dim)
        if config not in self.packs:
            self.packs[config] = Pack(self, config, views, out)
        return self.packs[config]

    def describe_columns(self, copy: torch.Tensor) -> Any:
        """A TMA descriptor of copied columns."""
        from maskdsl.codegen.kernel import rebase

        key = (tuple(copy.shape), copy.stride(), copy.dtype)
        if key not in self.columns:
            self.columns[key] = describe(copy, GRAIN_BLOCK)
        return rebase(self.columns[key], copy)


class Pack:
    """Kernels, descriptors and numbers of one config."""

    def __init__(self, calls: ListedCalls, config: HopperConfig, views: list[torch.Tensor],
                 out: torch.Tensor) -> None:
        (self.plan,), self.kernel = calls.forward.kernel(config)
        self.small = ListedKernels(self.plan)
        groups = calls.heads // config.heads_packed
        group = calls.heads // calls.kv_heads
        cut = schedule_listed(config, calls.shape, groups * calls.batch,
                              group // config.heads_packed)
        self.grid = min(cut.items, calls.processors)
        self.numbers = launch_numbers(cut, calls.batch, groups, group, calls.shape)
        q, k, v = views
        self.constants = constants_of(config, q.shape[3], v.shape[3], calls.with_lse)
        self.made = describe_all(q, k, v, out, config)


def prepare_listed(forward: HopperForward, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   shape: Shape, scale: float, make_out: OutputMaker, with_lse: bool,
                   config: HopperConfig | None = None) -> Call:
    """A function of (q, k, v, data) for every call that looks like this one."""
    from maskdsl.codegen.kernel import rebase

    device = q.device
    calls = ListedCalls(forward, q, k, v, shape, with_lse, config)
    no_parts = nothing(torch.float32, device)
    own_table = nothing(torch.int32, device)  # lists read tables of theirs

    def launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, data: dict[str, Any]) -> Any:
        result, out, lse = make_out(q)
        views = calls.view(q, k, v)
        pack = calls.pack(views, out, data)
        tables = pack.small.prepare(shape, calls.batch, calls.heads, calls.kv_heads, data, device)
        copies = [copy_columns(tables, t) for t in views[1:]] if pack.plan.lists.columns else []
        made = [rebase(d, t) for d, t in zip(pack.made, (q, k, v, k, v, out), strict=True)]
        pack.kernel[(pack.grid,)](
            *made[:5], *map(calls.describe_columns, copies), made[5], q if lse is None else lse,
            no_parts, no_parts, queue(device), own_table, BY_MAXIMUM, *pack.numbers,
            *pack.small.arguments(tables), scale, **pack.constants)
        return result

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, data: dict[str, Any]) -> Any:
        if device.index == torch.cuda.current_device():
            return launch(q, k, v, data)
        with torch.cuda.device(device):
            return launch(q, k, v, data)

    return call
