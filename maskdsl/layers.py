"""`compile_layers`: a `LayerPolicy` as something that computes attention, layer by layer.

A policy with `dense_fallback=True` says that its masks stand for dense attention. Then each call is
decided from what the host knows (lengths, sizes of lists): dense attention runs where it is
predicted to be no slower. `choose`, `choices` and `explain` tell what is decided and why,
MASKDSL_DEBUG=1 prints it, and a mask compiled by `compile` is never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from maskdsl.api import HEAD_DIM, Attention, compile
from maskdsl.atoms import Causal, Full
from maskdsl.binding import CallSize, check_slots, describe, wrap
from maskdsl.errors import MaskTypeError, ShapeError
from maskdsl.explaining import Sizes, fill_sizes, pick_kernel, pick_rates
from maskdsl.expr import Mask
from maskdsl.indices import ListSizes
from maskdsl.inputs import check_ranks
from maskdsl.patterns.policy import LayerPolicy
from maskdsl.settings import debug
from maskdsl.shape import Shape
from maskdsl.tiles import count_pairs
from maskdsl.trace import is_traceable

if TYPE_CHECKING:
    from maskdsl.codegen.cost import Prediction
    from maskdsl.codegen.explain import Explanation
    from maskdsl.codegen.workload import CallHeads

REMEMBERED = 4096  # decisions


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs in a layer for a call.

    mask              the mask that runs: the layer's own, or `Causal()`
    is_dense          whether dense attention takes the place of the layer's mask
    sparse, dense     the predictions compared; None where nothing was to be compared
    reason            one sentence
    """

    mask: Mask
    is_dense: bool
    reason: str
    sparse: Prediction | None = None
    dense: Prediction | None = None


def compile_layers(policy: LayerPolicy, *, backend: str | None = None, layout: str = "bhld",
                   scale: float | None = None, chip: str | None = None) -> Layers:
    """A callable that computes the attention of any layer of a model.

    policy   a `LayerPolicy`, as `maskdsl.patterns.triangle_mix` and `minference` make them
    chip     decide for this chip; default: the GPU here. Where it was not measured, the rates of an
             H100 decide, and the reason says so.
    backend, layout, scale  as in `compile`; masks are causal

    Errors: MaskTypeError, and those of `compile`.
    """
    if not isinstance(policy, LayerPolicy):
        raise MaskTypeError(f"compile_layers({policy!r})", f"a {type(policy).__name__}, which is "
                            "not a layer policy", "LayerPolicy([mask, ...]), or compile(mask) for "
                            "one mask")
    return Layers(policy, backend, layout, scale, chip)


class Layers:
    """Attention by layer: `layers(layer, q, k, v, **slots)`. Made by `compile_layers`."""

    def __init__(self, policy: LayerPolicy, backend: str | None, layout: str,
                 scale: float | None, chip: str | None) -> None:
        self.policy = policy
        self._options: dict[str, Any] = {"backend": backend, "layout": layout, "scale": scale}
        self._chip = chip
        self._compiled = {mask: compile(mask, **self._options) for mask, _ in policy.kinds()}
        self._choices: dict[Any, Choice] = {}

    def __len__(self) -> int:
        return len(self.policy)

    def __repr__(self) -> str:
        return f"<maskdsl layers of {self.policy!r}>"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What was decided so far, each kind of call once."""
        return tuple(self._choices.values())

    def attention(self, layer: int) -> Attention:
        """The compiled mask of a layer itself, which never falls back."""
        if not isinstance(layer, int) or not -len(self) <= layer < len(self):
            raise ShapeError(f"layer {layer!r}", f"the policy has layers 0..{len(self) - 1}",
                             f"a layer number below {len(self)}")
        return self._compiled[self.policy[layer]]

    @cached_property
    def dense(self) -> Attention:
        """Dense causal attention, compiled on first use."""
        return compile(Full(), **self._options)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                 scale: float | None = None, q_offset: int | None = None,
                 total_len: int | None = None, return_lse: bool = False, **slots: object) -> Any:
        """Attention of one layer; all but `layer` as in a call of a compiled mask.

        Data of slots that the layer's mask does not have is an UnknownSlotError, as there.
        """
        attn = self.attention(layer)
        run: Any = Attention.__call__  # its overloads do not see through a dict of options
        rest: dict[str, Any] = {"scale": scale, "q_offset": q_offset, "total_len": total_len,
                                "return_lse": return_lse}
        if not self.policy.dense_fallback:
            return run(attn, q, k, v, **rest, **slots)
        check_ranks(q, k, v, attn.layout)
        long, head = (1, 2) if attn.layout == "blhd" else (2, 1)
        shape = Shape(q.shape[long], k.shape[long], q_offset,  # type: ignore[arg-type]
                      total_len)  # type: ignore[arg-type]
        sizes = Sizes(q.shape[0], q.shape[head], k.shape[head], q.shape[3], v.shape[3])
        choice = self._choose(attn, shape, sizes, None, slots, q.device)
        if choice.is_dense:
            return run(self.dense, q, k, v, **rest)
        return run(attn, q, k, v, **rest, **slots)

    def choose(self, layer: int, q_len: int, kv_len: int | None = None, *,
               q_offset: int | None = None, total_len: int | None = None, batch: int | None = None,
               heads: int | None = None, kv_heads: int | None = None, head_dim: int = HEAD_DIM,
               value_dim: int | None = None, estimator: str | None = None,
               **slots: object) -> Choice:
        """What would run, decided without looking into any tensor.

        estimator  its time counts for the mask: "vertical_slash", ...; None: the data is there
        slots      the data, or `ListSizes` where there is none yet
        The rest as in `Attention.explain`.
        """
        shape = Shape(q_len, q_len if kv_len is None else kv_len, q_offset,  # type: ignore[arg-type]
                      total_len)  # type: ignore[arg-type]
        return self._choose(self.attention(layer), shape,
                            Sizes(batch, heads, kv_heads, head_dim, value_dim), estimator, slots)

    def explain(self, layer: int, q_len: int, kv_len: int | None = None, *,
                estimator: str | None = None, **options: Any) -> Explanation:
        """`Attention.explain` of a layer's mask, with what the policy would run and why.

        A slot may be given `ListSizes`: then its lists are not counted, and decide all the same.
        """
        attn = self.attention(layer)
        choice = self.choose(layer, q_len, kv_len, estimator=estimator, **options)
        data = {name: value for name, value in options.items()
                if not isinstance(value, ListSizes)}
        told = attn.explain(q_len, kv_len, estimator=estimator, chip=self._chip, **data)
        told = replace(told, fallback=choice.reason)
        if told.prediction is None and choice.sparse is not None:
            told = replace(told, prediction=choice.sparse, dense=choice.dense)
        return told

    def _choose(self, attn: Attention, shape: Shape, sizes: Sizes, estimator: str | None,
                slots: Mapping[str, object], device: torch.device | None = None) -> Choice:
        key = (attn.mask, shape, sizes, estimator, device, *sorted(slots),
               *(describe(slots[name]) for name in sorted(slots)))
        if key not in self._choices:
            if len(self._choices) >= REMEMBERED:
                self._choices.clear()
            wrapped = {atom.slot: wrap(atom, slots[atom.slot]) for atom in attn.slots
                       if atom.slot in slots}
            call = fill_sizes(sizes, attn.mask, wrapped)
            if device is not None:  # a call that falls back has no other check of its data
                check_slots(attn.slots, slots, CallSize(call.batch, call.heads, call.kv_heads,
                                                        device), shape)
            self._choices[key] = self._decide(attn, shape, call, estimator, wrapped)
            debug(1, f"{attn.mask!r}, {shape}: {self._choices[key].reason}")
        return self._choices[key]

    def _decide(self, attn: Attention, shape: Shape, call: CallHeads, estimator: str | None,
                slots: Mapping[str, Any]) -> Choice:
        mask = attn.mask
        if not self.policy.dense_fallback:
            return Choice(mask, False, "no: the policy does not allow it (dense_fallback=False)")
        if mask == Causal():
            return Choice(mask, False, "no: the layer is dense")
        if not is_traceable(mask):
            return Choice(mask, False, "no: nothing can be predicted of a function that cannot be "
                          "compiled")
        return compare(attn, shape, call, estimator, slots, self._chip)


def compare(attn: Attention, shape: Shape, call: CallHeads, estimator: str | None,
            slots: Mapping[str, Any], chip: str | None) -> Choice:
    """The choice between a mask that stands for dense attention, and dense attention."""
    from maskdsl.codegen.forecast import forecast_dense
    from maskdsl.codegen.packed import can_size, predict_packed

    mask = attn.mask
    lists = can_size(mask, slots)
    if isinstance(lists, str):
        return Choice(mask, False, f"no: the shape of {lists!r} does not tell how much it lists, "
                      "and its data is not read")
    rates, missing = pick_rates(chip)
    if rates is None:
        rates, _ = pick_rates("H100")
        assert rates is not None
    there = here = rates  # of the mask and of dense attention
    if not missing:  # else the chip here is another, which need not have the same kernels
        there, _ = pick_kernel(attn.compiled(), mask, rates, call)
        here, _ = pick_kernel(attn.compiled(), Causal(), rates, call)
    sparse = predict_packed(mask, there, shape, call, lists, estimator)
    dense = forecast_dense(here, shape, call)
    is_dense = dense.ms <= sparse.ms
    packed = ", lists taken as packed" if lists else ""
    foreign = f" (decided with its rates: {missing})" if missing else ""
    verb = "yes, dense attention runs" if is_dense else "no, the mask runs"
    if is_dense and not attn.slots and attn.heads is None and \
            count_pairs(mask, shape) == count_pairs(Causal(), shape):
        foreign += "; the mask keeps all causal pairs of this call, so this is no approximation"
    return Choice(Causal() if is_dense else mask, is_dense,
                  f"{verb}: predicted {dense.ms:.3g} ms dense, {sparse.ms:.3g} ms with the mask"
                  f"{packed}, on {rates.name}{foreign}", sparse, dense)
