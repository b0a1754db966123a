"""`compile` and its errors: every user mistake has a class and a cure, before anything runs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import maskdsl
from maskdsl import BlockDiagonal, Causal, Chunk, Full, LastQ, Sink, Window, compile, errors
from maskdsl.codegen.kernel import interpreting

ON_CPU = pytest.mark.skipif(not interpreting(), reason="a GPU is here: see tests/gpu")


def tensors(heads: int = 4, kv_heads: int = 2, length: int = 16, dim: int = 16,
            dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(1, h, length, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def changed(index: int, change: Any, **sizes: Any) -> list[torch.Tensor]:
    """The usual tensors with one of them changed."""
    args = tensors(**sizes)
    args[index] = change(args[index])
    return args


CALLS: list[tuple[type[errors.MaskDSLError], str, list[Any], dict[str, Any]]] = [
    (errors.RankError, "unsqueeze", changed(0, lambda t: t[0]), {}),
    (errors.RankError, "v has 5 dimensions", changed(2, lambda t: t[None]), {}),
    (errors.MaskTypeError, "k of type list", changed(1, lambda t: t.tolist()), {}),
    (errors.HeadCountError, "5 query heads", tensors(heads=5), {}),
    (errors.DtypeError, "differ", changed(1, lambda t: t.half()), {}),
    (errors.DtypeError, "int64", [t.long() for t in tensors()], {}),
    (errors.HeadDimError, "equal head dimensions", changed(1, lambda t: t.repeat(1, 1, 1, 2)), {}),
    (errors.HeadDimError, "16..256", tensors(dim=8), {}),
    (errors.HeadDimError, "16..256", changed(2, lambda t: t.repeat(1, 1, 1, 20)), {}),
    (errors.ShapeError, "batch sizes differ", changed(0, lambda t: t.repeat(2, 1, 1, 1)), {}),
    (errors.ShapeError, "heads or length", changed(2, lambda t: t[:, :, :9]), {}),
    (errors.LayoutError, "not contiguous", changed(1, lambda t: t.transpose(2, 3)), {}),
    (errors.ShapeError, "q_offset must be an integer", tensors(), {"q_offset": 1.5}),
    (errors.ShapeError, "cannot be shorter", tensors(), {"total_len": 3}),
    (errors.LengthError, "32 bits", tensors(), {"total_len": 1 << 40}),
    (errors.ScaleError, "finite", tensors(), {"scale": float("nan")}),
    (errors.ScaleError, "negate q", tensors(), {"scale": -1.0}),
    (errors.ScaleError, "finite", tensors(), {"scale": "big"}),
    (errors.UnknownSlotError, "no slot named 'doc'", tensors(), {"doc": 1}),
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("kind", "text", "args", "options"), CALLS)
def test_a_wrong_call_is_told(kind: type[errors.MaskDSLError], text: str, args: list[Any],
                              options: dict[str, Any], backend: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        compile(Causal(), backend=backend)(*args, **options)
    assert type(caught.value) is kind
    assert all(part in str(caught.value) for part in ("you wrote:", "problem:", "instead:"))


@pytest.mark.parametrize(("kind", "text", "mask", "options"), [
    (errors.MaskTypeError, "not a mask", 4, {}),
    (errors.MaskTypeError, "Where", lambda b, h, q, k: q >= k, {}),
    (errors.BackendError, "unknown backend", Causal(), {"backend": "cuda"}),
    (errors.LayoutError, "B, L, H, D", Causal(), {"layout": "bshd"}),
    (errors.ScaleError, "finite", Causal(), {"scale": float("inf")}),
    (errors.ResourceError, "power of two", Causal(), {"backend": "triton", "tile": (48, 64)}),
    (errors.ResourceError, "pair", Causal(), {"backend": "triton", "tile": 64}),
])
def test_a_wrong_compile_is_told(kind: type[errors.MaskDSLError], text: str, mask: Any,
                                 options: dict[str, Any]) -> None:
    with pytest.raises(kind, match=text):
        compile(mask, **options)


def test_a_function_that_cannot_be_compiled_is_told_at_once() -> None:
    flags = torch.ones(100, dtype=torch.bool)
    mask = Window(9) & maskdsl.Where(lambda b, h, q, k: flags[k])
    with pytest.raises(errors.TraceError, match="backend='torch'"):
        compile(mask, backend="triton")
    assert compile(mask, backend="torch")(*tensors()).shape == (1, 4, 16, 16)


def test_a_tile_on_the_torch_backend_is_not_ignored_in_silence() -> None:
    with pytest.raises(errors.BackendError, match="tile"):
        compile(Causal(), backend="torch", tile=(64, 64))


def test_a_length_beyond_the_mask_is_told() -> None:
    attn = compile(BlockDiagonal([4, 8]), backend="torch")
    with pytest.raises(errors.LengthError, match="nothing beyond 12 tokens"):
        attn(*tensors(length=13))
    assert attn(*tensors(length=12)).shape == (1, 4, 12, 16)


@ON_CPU
def test_gradients_are_refused_where_they_were_forbidden() -> None:
    q, k, v = tensors()
    attn = compile(Causal(), backend="triton", backward=False)
    with pytest.raises(errors.GradientError, match="backward=False"):
        attn(q, k.requires_grad_(), v)
    with torch.no_grad():
        attn(q, k, v)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_tensor_that_is_aligned_otherwise_is_another_kind_of_call(moved: int) -> None:
    """The hardware copies tiles from multiples of 16 bytes only."""
    attn = compile(Causal(), backend="torch")
    given = [t.contiguous() for t in tensors()]
    expected = attn(*given)
    room = torch.empty(given[moved].numel() + 1)
    given[moved] = room[1:].view_as(given[moved]).copy_(given[moved])
    assert torch.equal(attn(*given), expected) and len(attn._ready) == 2


@ON_CPU
def test_a_second_call_of_the_same_kind_is_checked_too() -> None:
    attn = compile(Causal(), backend="triton", backward=False)
    q, k, v = tensors()
    attn(q, k, v)
    with pytest.raises(errors.GradientError):
        attn(q, k, v.requires_grad_())
    with pytest.raises(errors.HeadCountError):
        attn(*tensors(heads=3))


@ON_CPU
def test_without_a_gpu_triton_is_refused_and_torch_is_the_default() -> None:
    program = ("import maskdsl\nassert maskdsl.compile(maskdsl.Causal()).backend == 'torch'\n"
               "maskdsl.compile(maskdsl.Causal(), backend='triton')")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                         env={"PATH": "/usr/bin", "TRITON_INTERPRET": "0"}, check=False)
    assert "BackendError" in run.stderr
    assert "there is no GPU here" in run.stderr


def test_importing_maskdsl_does_not_import_triton() -> None:
    program = "import maskdsl, maskdsl.patterns, sys; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                         check=True)
    assert run.stdout.strip() == "False"


def test_causal_is_the_default_and_can_be_left_out() -> None:
    assert compile(Full()).mask == Causal()
    assert compile(Window(4, 9)).mask == Window(4)
    assert compile(Window(4, 9), causal=False).mask == Window(4, 9)


def test_what_a_compiled_mask_shows() -> None:
    attn = compile(Sink(4) | Window(64) | LastQ(9), backend="torch")
    assert attn.backend == "torch"
    assert "Sink(4)" in repr(attn)
    assert "def forward(" in attn.source
    assert "Sink(4)" in attn.source
    assert len(attn.plan.pieces) == 3
    told = attn.explain(1000)
    text = str(told)
    assert f"{told.live_pairs:,}" in text
    assert told.closed_form in text
    assert told.full_tiles + told.masked_tiles == told.visited_tiles


def test_explain_counts_what_dense_counts() -> None:
    mask = Sink(4) | Window(64) | Chunk(100)
    told = compile(mask, backend="torch").explain(300, 500)
    live = maskdsl.dense(Causal() & mask, maskdsl.Shape(300, 500))
    assert told.live_pairs == int(live.sum())
    assert told.closed_form == ""
    assert told.dense_bytes == 300 * 500


def test_scale_of_compile_and_of_the_call() -> None:
    q, k, v = tensors()
    fixed = compile(Causal(), backend="torch", scale=0.5)
    assert torch.equal(fixed(q, k, v), compile(Causal(), backend="torch")(q, k, v, scale=0.5))
    assert not torch.equal(fixed(q, k, v), fixed(q, k, v, scale=0.1))
