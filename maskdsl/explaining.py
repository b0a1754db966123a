"""From the arguments of `Attention.explain` to what the compiler is asked to count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from maskdsl.atoms import Causal
from maskdsl.binding import CallSize, check_slots, wrap
from maskdsl.dynamic import SlotMask
from maskdsl.errors import BackendError, HeadCountError
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.inputs import check_heads, check_limit
from maskdsl.shape import Shape, check_length
from maskdsl.trace import is_traceable

if TYPE_CHECKING:
    from maskdsl.codegen.cost import Prediction
    from maskdsl.codegen.explain import Explanation
    from maskdsl.codegen.rates import Rates
    from maskdsl.codegen.workload import CallHeads

PORTABLE = "triton"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What is known of a compiled mask.

    mask     simplified; written: with `Causal()` where it was added, not simplified
    slots    the slots the user wrote
    backend  what runs; asked: whether the user named it
    tile     the user's choice, or None
    scores   whether score modifiers are computed too
    """

    mask: Mask
    written: Mask
    slots: tuple[SlotMask, ...]
    backend: str
    asked: bool
    tile: tuple[int, int] | None
    limit: int | None
    scores: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a call as a user gives them; None where left out."""

    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int = 128
    value_dim: int | None = None


def fill_sizes(sizes: Sizes, mask: Mask, data: Mapping[str, Any]) -> CallHeads:
    """Sizes left out are those the mask or the data has, else 1; or a ShapeError."""
    from maskdsl.codegen.workload import CallHeads

    leads = [value.lead for value in data.values() if hasattr(value, "lead")]
    batch = max([1, *(b for b, _ in leads)]) if sizes.batch is None else sizes.batch
    known = count_heads(mask)
    heads = sizes.heads
    if heads is None:
        heads = known or max([1, *(h for _, h in leads)])
    kv_heads = sizes.kv_heads
    if kv_heads is None:
        kv_heads = min([heads, *(h for _, h in leads if h > 1 and heads % h == 0)])
    value_dim = sizes.head_dim if sizes.value_dim is None else sizes.value_dim
    for name, value in (("batch", batch), ("heads", heads), ("kv_heads", kv_heads),
                        ("head_dim", sizes.head_dim), ("value_dim", value_dim)):
        check_length(name, value, 1)
    check_heads(known, heads)
    if heads % kv_heads:
        raise HeadCountError(f"explain(heads={heads}, kv_heads={kv_heads})",
                             f"{heads} query heads cannot share {kv_heads} key/value heads evenly",
                             "a number of query heads that is a multiple of the key/value heads")
    return CallHeads(batch, heads, kv_heads, sizes.head_dim, value_dim)


def explain(compiled: Compiled, shape: Shape, sizes: Sizes, chip: str | None,
            estimator: str | None, slots: Mapping[str, object]) -> Explanation:
    """Count and predict one call of a compiled mask."""
    from maskdsl.codegen.explain import Request, explain_call
    from maskdsl.codegen.forecast import HOPPER, tile_on
    from maskdsl.codegen.hopper_work import item_of
    from maskdsl.codegen.torch_backend import BLOCK_M, BLOCK_N, plannable

    check_limit(compiled.limit, shape, compiled.mask)
    wrapped = {atom.slot: wrap(atom, slots[atom.slot]) for atom in compiled.slots
               if atom.slot in slots}
    call = fill_sizes(sizes, compiled.mask, wrapped)
    data = None
    if slots:
        devices = [value.device for value in wrapped.values() if hasattr(value, "device")]
        size = CallSize(call.batch, call.heads, call.kv_heads,
                        devices[0] if devices else torch.device("cpu"))
        data = check_slots(compiled.slots, slots, size, shape)
    rates, no_rates = pick_rates(chip)
    refused, dense_rates = "", rates
    if rates is not None:
        dense_rates = pick_kernel(compiled, Causal(), rates, call)[0]
        rates, refused = pick_kernel(compiled, compiled.mask, rates, call)
    kernel = name_kernel(compiled, rates, chip is not None)
    widen = None
    if kernel == "torch":
        tile, widen = (BLOCK_M, BLOCK_N), plannable
    elif kernel == HOPPER:
        tile = item_of(compiled.mask, call)
    else:
        arch = present_arch() if chip is None or rates is None else rates.arch
        tile = tile_on(compiled.mask, arch, call, compiled.tile)
    return explain_call(Request(
        compiled.mask, compiled.written, compiled.backend, why_backend(compiled), kernel, refused,
        shape, call, tile, compiled.tile, data, rates, dense_rates, no_rates, estimator, widen))


def predict(compiled: Compiled, shape: Shape, sizes: Sizes,
            chip: str | None = None) -> Prediction | None:
    """Only the predicted time of a call without data; None where nothing can be predicted."""
    from maskdsl.codegen.forecast import forecast

    call = fill_sizes(sizes, compiled.mask, {})
    rates, _ = pick_rates(chip)
    if rates is None or not is_traceable(compiled.mask):
        return None
    rates, _ = pick_kernel(compiled, compiled.mask, rates, call)
    return forecast(compiled.mask, rates, shape, call, chosen=compiled.tile).prediction


def pick_kernel(compiled: Compiled, mask: Mask, rates: Rates, call: CallHeads) -> tuple[Rates, str]:
    """(rates of the kernel that would run a mask on the chip of some rates, why that is not the
    Hopper kernel). The reason is "" where it is, where the chip has none, and where the user asked
    for the portable kernel."""
    from maskdsl.codegen.forecast import HOPPER, refuse_call_of
    from maskdsl.codegen.rates import RATES

    found = RATES.get((rates.arch, HOPPER))
    if found is None or (compiled.asked and compiled.backend == PORTABLE):
        return rates, ""
    refused = refuse_call_of(mask, call, compiled.asked and compiled.backend == HOPPER)
    if compiled.tile is not None:
        refused = "a tile was chosen, which only the portable kernel takes"
    if compiled.scores:
        refused = "scores are modified, which only the portable kernel does"
    return (rates, refused) if refused else (found, "")


def name_kernel(compiled: Compiled, rates: Rates | None, chip_named: bool) -> str:
    """The backend whose work is explained: of a chip that was named, what it would run; else what
    runs here."""
    if chip_named and rates is not None and is_traceable(compiled.mask):
        return rates.target
    if compiled.backend == "torch":
        return "torch"
    return PORTABLE if rates is None or compiled.backend == PORTABLE else rates.target


def why_backend(compiled: Compiled) -> str:
    """Why this backend runs."""
    if compiled.asked:
        return "as asked for"
    return "a GPU is here" if torch.cuda.is_available() else "no GPU here"


def present_arch() -> str:
    """The chip here, as `tune` spells it; "cpu" where there is none."""
    from maskdsl.codegen.kernel import arch_of, interpreting

    return arch_of(torch.device("cpu" if interpreting() else "cuda"))


def pick_rates(chip: str | None) -> tuple[Rates | None, str]:
    """(measured rates of the portable kernel on a chip, or why there are none): the chip named;
    else the one here; where there is no GPU, an H100. A chip that is named and was not measured is
    a BackendError."""
    from maskdsl.codegen.cost import find_rates

    if chip is not None:
        return find_rates(chip), ""
    if not torch.cuda.is_available():
        return find_rates("H100"), ""
    try:
        return find_rates(present_arch()), ""
    except BackendError as error:
        return None, f"{error.wrong} ({present_arch()}); chip='H100' predicts for that one"
