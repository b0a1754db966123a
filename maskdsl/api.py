"""`compile`: from a mask to something that computes attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch

from maskdsl import ops
from maskdsl.atoms import Causal
from maskdsl.backends import check_autotune, check_backward, pick_backend, tell_refusal
from maskdsl.binding import CallSize, check_names, check_slots, describe, wrap
from maskdsl.dynamic import SlotMask
from maskdsl.errors import BackendError, MaskTypeError
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.inputs import (
    DTYPES,
    check_heads,
    check_layout,
    check_limit,
    check_ranks,
    check_scale,
    check_tensors,
    gradient_error,
    wants_gradients,
)
from maskdsl.scores import ScoreMod, check_score_data, check_scores
from maskdsl.shape import Shape
from maskdsl.simplify import simplify

if TYPE_CHECKING:
    from maskdsl.codegen.autotune import Autotuned
    from maskdsl.codegen.choices import Tuned
    from maskdsl.codegen.explain import Explanation
    from maskdsl.codegen.kernel import TritonForward
    from maskdsl.codegen.plan import Plan
    from maskdsl.codegen.torch_backend import TorchForward
    from maskdsl.explaining import Compiled

Result: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
ANY_AUTOCAST = torch._C._is_any_autocast_enabled  # a quarter of the cost of asking for one device
READY_LIMIT = 4096  # kinds of calls remembered
HEAD_DIM = 128  # what `.plan` and `.source` show before the first call


def compile(mask: Mask, *, causal: bool = True, backend: str | None = None,
            layout: str = "bhld", scale: float | None = None,
            tile: tuple[int, int] | None = None,
            scores: ScoreMod | Iterable[ScoreMod] | None = None,
            autotune: bool = False, backward: bool | str = True) -> Attention:
    """A callable that computes attention under `mask`, specialised for it.

    mask     the allowed (query, key) pairs
    causal   True (default) intersects with `Causal()`, since these are decoder prefill patterns;
             False takes the mask as it stands (two-sided windows, `PrefixLM`, cross attention)
    backend  "hopper" (H100, H200: the fastest kernel; static masks, float16 and bfloat16, head
             dimensions up to 256; asked for by name also call-time data and random blocks, which
             "triton" runs by default), "triton" (any GPU), "torch" (any device).
             Default: the first of them that this machine and the mask allow; what "hopper" then
             cannot take (`.refusal(q, k, v)` says what and why), "triton" computes. A backend
             asked for by name runs or raises. What was chosen is told by `.backend`.
    layout   "bhld" for [B, H, L, D] tensors, "blhd" for [B, L, H, D]
    scale    softmax scale; default D ** -0.5
    tile     (queries, keys) per tile of the Triton kernel; default: tuned, see `.explain()`
    autotune True times the kernels' settings on the first call of each kind (seconds to minutes),
             and keeps the fastest on disk; `.tuned` tells. Needs a GPU, and no `tile`. A kind that
             is new under CUDA graph capture is a BackendError.

    scores   score modifiers, applied in order: `Softcap`, `ALiBi`, `Bias`, `RelativePosition`,
             `SinkLogits`; the data of those that take some is given at the call, by name
    backward True (default): kernels compute the gradients of q, k, v and the data of score
             modifiers: the same bits every time, unless a nearly dense mask is faster with
             atomics (Hopper). "deterministic", or `torch.use_deterministic_algorithms`: always.
             False: an input that requires a gradient is a GradientError. The torch backend is
             always differentiable, twice as well.

    Errors: MaskTypeError, ScoreModError, BackendError, LayoutError, ScaleError, ResourceError.
    """
    if not isinstance(mask, Mask):
        raise MaskTypeError(f"compile({mask!r})", f"a {type(mask).__name__}, which is not a mask",
                            "an expression such as Sink(4) | Window(2048), or Where(fn)")
    written = Causal() & mask if causal else mask
    whole = simplify(written)
    slots = check_names(mask)
    mods = check_scores(scores, slots)
    check_backward(backward)
    chosen = pick_backend(backend, whole, tile, bool(mods))
    if autotune:
        check_autotune(chosen, tile, bool(mods))
    made = Attention(whole, chosen, check_layout(layout), scale, tile, slots, mods,
                     strict=backend is not None, autotune=autotune,
                     backward=backward)
    made.written = written
    return made


class Attention:
    """Attention under one mask: call it with q, k, v. Made by `compile`."""

    written: Mask | None = None  # before simplification, for `explain`

    def __init__(self, mask: Mask, backend: str, layout: str, scale: float | None,
                 tile: tuple[int, int] | None, slots: tuple[SlotMask, ...] = (),
                 scores: tuple[ScoreMod, ...] = (), *, strict: bool = True,
                 autotune: bool = False, backward: bool | str = True) -> None:
        self.mask = mask
        self.backward = backward
        self.slots = slots  # as the user wrote them: simplification may drop one
        self._used = check_names(mask)
        self.scores = scores
        self._score_names = tuple(mod.name for mod in scores if mod.name)
        self.backend = backend
        self.strict = strict  # the backend was asked for by name
        self.layout = layout
        self.scale = None if scale is None else check_scale(scale, 1)
        self.limit = min((x for node in mask.walk() if (x := node.limit()) is not None),
                         default=None)
        self.heads = count_heads(mask)
        self._tile = tile
        self._ready: dict[Any, Any] = {}  # what a call looks like -> how to run it
        self._key = ops.register(self, mask, {"backend": backend, "strict": strict,
                                              "layout": layout, "scale": scale,
                                              "tile": tile, "autotune": autotune,
                                              "backward": backward}, scores)
        forward: Any = self._forward  # what cannot be compiled fails now, not at the first call
        self._autotuned: Autotuned | None = None
        if autotune:
            from maskdsl.codegen.autotune import Autotuned

            self._autotuned = Autotuned(forward)

    @cached_property
    def _forward(self) -> TritonForward | TorchForward:
        if self.backend == "torch":
            from maskdsl.codegen.torch_backend import TorchForward

            if self._tile is not None:
                raise BackendError(f"tile={self._tile!r} with backend='torch'",
                                   "only the Triton kernel has a choice of tile",
                                   "leave tile out, or backend='triton'")
            return TorchForward(self.mask, self.scores)
        from maskdsl.codegen.kernel import TritonForward
        from maskdsl.codegen.tune import config_for_tile

        hopper = self.backend == "hopper"
        return TritonForward(self.mask, config_for_tile(self._tile) if self._tile else None,
                             scores=self.scores, hopper=hopper, must=hopper and self.strict)

    def refusal(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                backward: bool = False) -> str:
        """Why the Hopper kernel does not take such a call, so that the portable one runs it (or,
        by name, an error is raised); "" where it does. backward: of the gradients' kernels."""
        check_ranks(q, k, v, self.layout)
        forward: Any = self._forward
        return tell_refusal(forward, (q, k, v), self.layout == "blhd", backward)

    def __repr__(self) -> str:
        return f"<maskdsl attention {self.mask!r}, backend={self.backend!r}>"

    def __reduce__(self) -> tuple[Any, ...]:  # by its text, as in a graph
        return ops.find, (self._key,)

    @overload
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                 scale: float | None = None, q_offset: int | None = None,
                 total_len: int | None = None, return_lse: Literal[False] = False,
                 **slots: object) -> torch.Tensor: ...

    @overload
    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                 scale: float | None = None, q_offset: int | None = None,
                 total_len: int | None = None, return_lse: Literal[True],
                 **slots: object) -> tuple[torch.Tensor, torch.Tensor]: ...

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
                 scale: float | None = None, q_offset: int | None = None,
                 total_len: int | None = None, return_lse: bool = False,
                 **slots: object) -> Result:
        """softmax(scale * q k^T restricted to the mask) v.

        q          [B, Hq, Lq, D]; float16, bfloat16 or float32; D in 16..256
        k, v       [B, Hkv, Lk, D], [B, Hkv, Lk, Dv]; Hq a whole multiple of Hkv; Dv in 16..256
                   (all three [B, L, H, D] when compiled with layout="blhd"); any strides with a
                   contiguous last dimension, nothing is copied
        scale      softmax scale; default D ** -0.5
        q_offset   absolute position of query row 0, in tokens; default Lk - Lq
        total_len  length of the whole prompt in tokens; default Lk. Chunked prefill needs it for
                   masks that count from the end (`LastQ`).
        slots      data for every slot of the mask and for score modifiers, by name:
                   `vs=VSIndices(...)`

        Returns the output, of q's dtype and layout with last dimension Dv; with return_lse=True
        also the log-sum-exp, float32 [B, Hq, Lq], natural logarithm. A row without a live key
        gives 0 and -inf. Errors: subclasses of ShapeError, DtypeError, DeviceError, ScaleError,
        UnknownSlotError, MissingSlotError, SlotDataError, GradientError, all before anything is
        launched.
        """
        if torch.compiler.is_compiling() or ANY_AUTOCAST():
            return self._call_traced(q, k, v, scale, q_offset, total_len, return_lse, slots)
        return self._call_eager(q, k, v, scale, q_offset, total_len, return_lse, slots)

    def _call_eager(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    scale: float | None, q_offset: int | None, total_len: int | None,
                    return_lse: bool, slots: dict[str, Any]) -> Result:
        """Find how calls that look like this one are run, and run it."""
        try:
            wants = self.backend != "torch" and wants_gradients(
                q, k, v, *(slots.get(name) for name in self._score_names))
            key = (wants, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
                   q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
                   (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16,
                   scale, q_offset, total_len, return_lse,
                   *(describe(slots[name]) for name in sorted(slots)), *sorted(slots))
            call = self._ready.get(key)
        except (AttributeError, TypeError):
            check_ranks(q, k, v, self.layout)  # says what is no tensor
            raise
        if call is None:
            if wants and not self.backward:
                raise gradient_error()
            call = self._prepare(q, k, v, scale, q_offset, total_len, return_lse, slots, wants)
            if len(self._ready) >= READY_LIMIT:
                self._ready.clear()
            self._ready[key] = call
        data = self._data_of(slots) if slots else {}
        result: Result = call(q, k, v, data)
        return result

    def _data_of(self, slots: dict[str, Any]) -> dict[str, Any]:
        """The data a backend takes, by name."""
        data = {atom.slot: wrap(atom, slots[atom.slot]) for atom in self._used}
        for name in self._score_names:
            data[name] = slots[name]
        return data

    def prepare_call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
                     q_offset: int | None, total_len: int | None, return_lse: bool,
                     slots: dict[str, object]) -> Callable[..., Any]:
        """A checked call, as a function of (q, k, v, slots) of the same sizes."""
        call = self._prepare(q, k, v, scale, q_offset, total_len, return_lse, slots)
        return lambda q, k, v, slots: call(q, k, v, self._data_of(slots))

    def _call_traced(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                     scale: float | None, q_offset: int | None, total_len: int | None,
                     return_lse: bool, slots: dict[str, Any]) -> Result:
        """A call inside a graph or under autocast, which casts q, k and v as it does for SDPA."""
        numbers = (scale, q_offset, total_len, return_lse)
        if not torch.compiler.is_compiling():
            q, k, v = ops.cast_as_sdpa(q, k, v)
            with torch.autocast(q.device.type, enabled=False):
                return self._call_eager(q, k, v, *numbers, slots)
        check_ranks(q, k, v, self.layout)
        keeps = self.backend != "torch" and wants_gradients(
            q, k, v, *(slots.get(name) for name in self._score_names))
        result: Result = ops.call((q, k, v), self._key, numbers, slots, keeps)
        return result

    def _prepare(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
                 q_offset: int | None, total_len: int | None, return_lse: bool,
                 slots: dict[str, object], wants_grad: bool = False) -> Any:
        """Check a call of a new kind, and decide all that calls of its kind share."""
        (q, k, v), shape, number, data = self._check(q, k, v, scale, q_offset, total_len, slots)
        if wants_grad:
            from maskdsl.codegen.gradients import prepare_gradients

            forward: Any = self._forward
            return prepare_gradients(forward, q, k, v, shape, number, self.layout, return_lse,
                                     self.backward == "deterministic")
        if self._autotuned is not None:
            return self._autotuned.prepare(q, k, v, shape, number, self.layout, return_lse, data)
        return self._forward.prepare(q, k, v, shape, number, self.layout, return_lse)

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None,
               q_offset: int | None, total_len: int | None, slots: dict[str, object]) -> tuple[
                   tuple[torch.Tensor, torch.Tensor, torch.Tensor], Shape, float, dict[str, Any]]:
        """q, k, v as [B, H, L, D], shape, scale and slots' data of a call that is in order."""
        check_ranks(q, k, v, self.layout)
        if self.layout == "blhd":
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        check_tensors(q, k, v, DTYPES if self.backend != "torch" else (*DTYPES, torch.float64))
        shape = Shape(q.shape[2], k.shape[2], q_offset, total_len)  # type: ignore[arg-type]
        check_limit(self.limit, shape, self.mask)
        check_heads(self.heads, q.shape[1])
        size = CallSize(q.shape[0], q.shape[1], k.shape[1], q.device)
        masks = {name: data for name, data in slots.items() if name not in self._score_names}
        data = check_slots(self.slots, masks, size, shape, self._score_names)
        check_score_data(self.scores, slots, q.shape[0], q.shape[1], shape, q.device)
        number = check_scale(self.scale if scale is None else scale, q.shape[3])
        return (q, k, v), shape, number, data

    def kernel_gradients(self, tensors: tuple[torch.Tensor, ...], grad_out: torch.Tensor,
                         grad_lse: torch.Tensor | None, numbers: tuple[Any, Any, Any],
                         slots: dict[str, object],
                         wanted: set[str]) -> dict[str, torch.Tensor]:
        """Gradients by the kernels, by name: those `wanted` among q, k, v and the data of score
        modifiers.

        tensors  q, k, v, output in the call's layout, and the lse; numbers: scale, q_offset,
                 total_len as in the call
        """
        from maskdsl.codegen.gradients import prepare_backward

        q, k, v = tensors[:3]
        views, shape, number, _ = self._check(q, k, v, *numbers, slots)
        forward: Any = self._forward
        call = prepare_backward(forward, *views, shape, number, self.layout,
                                self.backward == "deterministic")
        names = frozenset(wanted - set("qkv"))
        found = call.gradients(tensors, grad_out, grad_lse, ("q" in wanted, bool(wanted & {"k",
                               "v"})), self._data_of(slots), names)
        return {name: t for name, t in zip(("q", "k", "v", *self._score_names), found, strict=True)
                if t is not None}

    @property
    def tuned(self) -> tuple[Tuned, ...]:
        """What `autotune=True` chose so far, each kind of call once: its `.setting`, the `.times`
        of all candidates in milliseconds, what `.failed`, and its `.source`. () without autotune.
        `plan`, `source` and `explain` are those of the default setting."""
        return () if self._autotuned is None else tuple(self._autotuned.choices.values())

    @property
    def plan(self) -> Plan:
        """The plan of the kernel for bfloat16 and head dimension 128 (or of the torch backend); of
        `PerHead` that of one kind of head (the costliest, on a GPU); of the Hopper kernel that for
        four query heads a key/value head."""
        forward: Any = self._forward
        plan: Plan
        if self.backend == "torch":
            plan = forward.plan
        elif self.backend == "hopper":
            plan = forward.hopper.default_plan(HEAD_DIM)
        else:
            plan = forward.default_plans(HEAD_DIM)[0]
        return plan

    @property
    def source(self) -> str:
        """The Triton source of `plan`: a file that stands alone."""
        from maskdsl.codegen.emit import emit_kernels, emit_source

        if self.backend == "torch":
            return emit_source(self.plan)
        forward: Any = self._forward
        if self.backend == "hopper":
            source: str = forward.hopper.default_source(HEAD_DIM)
            return source
        heads = tuple(len(heads) for heads, _ in forward.kinds if heads)
        return emit_kernels(forward.default_plans(HEAD_DIM), heads)

    def compiled(self) -> Compiled:
        """What `explain` and `compile_layers` need to know of it."""
        from maskdsl.explaining import Compiled

        return Compiled(self.mask, self.mask if self.written is None else self.written,
                        self.slots, self.backend, self.strict, self._tile, self.limit,
                        bool(self.scores))

    def explain(self, q_len: int, kv_len: int | None = None, *, q_offset: int | None = None,
                total_len: int | None = None, batch: int | None = None, heads: int | None = None,
                kv_heads: int | None = None, head_dim: int = HEAD_DIM,
                value_dim: int | None = None, chip: str | None = None,
                estimator: str | None = None, **slots: object) -> Explanation:
        """What a call costs: live pairs, tiles, memory, predicted time; `print` it.

        q_len, kv_len, q_offset, total_len  in tokens, as in a call; kv_len defaults to q_len
        batch, heads, kv_heads, head_dim, value_dim  of the call; default: what the mask and the
                   slots' data have, else 1, and a head dimension of 128
        chip       "H100": count and predict what this chip would run (there the Hopper kernel,
                   where it takes the mask); default: count what runs here, and predict for the GPU
                   here, or an H100 where there is none. Only chips with measured rates.
        estimator  "vertical_slash", "flex_prefill", "xattention" or "block_topk": its time counts
        slots      data for every slot, as in the call: then lists are counted too, exactly. This
                   reads the data back from its device. Without it lists count as empty.

        Errors: ShapeError, HeadCountError, BackendError, and those of a call's slots.
        """
        from maskdsl.explaining import Sizes, explain

        shape = Shape(q_len, q_len if kv_len is None else kv_len, q_offset,  # type: ignore[arg-type]
                      total_len)  # type: ignore[arg-type]
        return explain(self.compiled(), shape,
                       Sizes(batch, heads, kv_heads, head_dim, value_dim), chip, estimator, slots)


def explain(mask: Mask, q_len: int, kv_len: int | None = None, *, causal: bool = True,
            backend: str | None = None, **options: Any) -> Explanation:
    """What a call under `mask` costs: `compile(mask, ...).explain(q_len, kv_len, ...)`.

    >>> from maskdsl import Window, explain
    >>> explain(Window(4), 100).live_pairs
    394
    """
    return compile(mask, causal=causal, backend=backend).explain(q_len, kv_len, **options)


ops.set_builder(Attention)
