"""Calls of the Hopper kernel with its launches on `gluon_threads`: the rest is the real path."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gluon_threads import Descriptor, Pointer, run_forward

from maskdsl.codegen import hopper, hopper_listed
from maskdsl.codegen.build import load_module
from maskdsl.codegen.emit_hopper_lists import kernel_parameters
from maskdsl.codegen.hopper import HopperForward
from maskdsl.codegen.hopper_cut import HopperConfig
from maskdsl.codegen.plan import Plan


class ThreadKernel:
    """Stands in for the compiled kernel: takes the launcher's arguments, runs the file's text."""

    def __init__(self, source: str, plan: Plan) -> None:
        self.source = source
        self.names = load_module(self.source).forward.arg_names
        self.more = [p.name for p in kernel_parameters(plan)] if plan.lists.atoms else []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.run

    def run(self, *arguments: Any, **constants: Any) -> None:
        found = dict(zip(self.names, arguments, strict=False))
        descriptors = [Descriptor(view_of(found[n]).double().numpy(), found[n].block_shape)
                       for n in self.names if n.endswith("_desc") and n != "out_desc"]
        out = view_of(found["out_desc"])
        values = out.double().numpy() * np.nan
        written = ["part_ptr", "part_lse_ptr", *(["lse_ptr"] if constants["WITH_LSE"] else [])]
        memory = {n: Pointer(np.full(found[n].numel(), np.nan)) for n in [*written, "lse_ptr"]}
        memory["own_table"] = pointer_to(found["own_table"])
        first, last = self.names.index("items"), self.names.index("total_len")
        numbers = list(arguments[first:last + 1])
        # the machine divides by the divisors themselves, not by what the host makes of them
        light = (numbers[1] - numbers[6]) * numbers[4]
        numbers[9:15] = [light, 0, numbers[4], 0, numbers[3], 0]
        more = [pointer_to(x) if isinstance(x, torch.Tensor) else x
                for x in map(found.__getitem__, self.more)]
        run_forward(self.source, constants, descriptors, values, found["out_desc"].block_shape[3],
                    [memory[n] for n in ("lse_ptr", "part_ptr", "part_lse_ptr", "own_table")],
                    numbers, more, found["scale"], seed=len(self.source))
        out.copy_(torch.from_numpy(values))
        for name in written:
            found[name].copy_(torch.from_numpy(memory[name].memory).view(found[name].shape))


def pointer_to(t: torch.Tensor) -> Pointer:
    """A pointer to a copy of integers."""
    return Pointer(t.numpy().astype(np.int64).ravel())


def view_of(descriptor: Any) -> torch.Tensor:
    """The tensor a TMA descriptor copies from."""
    found: torch.Tensor = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    return found


def launch_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run on threads; the rest of a call is what runs on a GPU."""
    def kernel(self: HopperForward, config: HopperConfig) -> tuple[tuple[Plan, ...], Any]:
        plans = self.plans(config)
        return plans, ThreadKernel(self.source(config), plans[0])

    monkeypatch.setattr(HopperForward, "kernel", kernel)
    for module in (hopper, hopper_listed):
        monkeypatch.setattr(module, "queue", lambda _: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(multi_processor_count=1))
