"""torch.compile, torch.export and autocast: one operator in the graph, no break, no recompilation.

The graphs run through dynamo and AOTAutograd ("aot_eager"), which is where breaks, guards, fake
tensors and gradients live; one slow test adds inductor. tests/gpu has CUDA graphs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import maskdsl
from maskdsl import (
    Bias,
    BlockIndices,
    Blocks,
    Causal,
    Document,
    Documents,
    LastQ,
    Sink,
    SinkLogits,
    Softcap,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
    errors,
)
from maskdsl.codegen.kernel import interpreting

TRIANGLE = Sink(3) | Window(9) | LastQ(5)
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(
    not interpreting(), reason="a GPU is here: see tests/gpu"))]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def inputs(length: int, heads: int = 4, grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, h, length, 16, generator=generator).requires_grad_(grad)
            for h in (heads, 2, 2)]


def compiled(fn: Callable[..., Any], **options: Any) -> tuple[Any, Any]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(fn, backend=counter, fullgraph=True, **options), counter


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_lengths_one_graph(backend: str) -> None:
    attn = maskdsl.compile(TRIANGLE, backend=backend)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        out, lse = attn(q * 2, k, v, return_lse=True)
        return out + 1, lse

    run, counter = compiled(layer, dynamic=True)
    with torch.no_grad():
        for length in range(20, 60, 2):
            q, k, v = inputs(length, heads=2)
            out, lse = run(q, k, v)
            expected, expected_lse = layer(q, k, v)
            assert torch.allclose(out, expected) and torch.allclose(lse, expected_lse)
    assert counter.frame_count == 1
    assert counters["graph_break"] == {}


def test_lengths_become_dynamic_by_themselves() -> None:
    attn = maskdsl.compile(TRIANGLE, backend="torch")
    run, counter = compiled(lambda q, k, v: attn(q, k, v))
    for length in range(20, 60, 2):
        run(*inputs(length))
    assert counter.frame_count == 2  # the first for its one length, the second for all


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_layouts_and_arguments(backend: str, layout: str) -> None:
    attn = maskdsl.compile(TRIANGLE, backend=backend, layout=layout)
    q, k, v = inputs(40)
    if layout == "blhd":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))

    def call(q: torch.Tensor, offset: int) -> Any:
        return attn(q, k, v, q_offset=offset, total_len=60, scale=0.3, return_lse=True)

    run, _ = compiled(call)
    part = q[:, :, :10] if layout == "bhld" else q[:, :10]
    with torch.no_grad():
        for offset in (30, 20):
            for a, b in zip(run(part, offset), call(part, offset), strict=True):
                assert torch.allclose(a, b) and a.shape == b.shape


def test_data_goes_through_a_graph() -> None:
    mask = VerticalSlash("vs") | Blocks("blk", 16, 16) | Sink(2) & Document("doc")
    attn = maskdsl.compile(mask, backend="torch", scores=[Softcap(3.0), SinkLogits("sinks")])
    q, k, v = inputs(48)
    vertical, slash = torch.tensor([[[1, 5]]]), torch.tensor([[[0, 7]]])
    live = torch.eye(3, dtype=torch.bool).view(1, 1, 3, 3)
    documents = Documents.from_ids(torch.tensor([0] * 20 + [1] * 28))

    def call(q: torch.Tensor, vertical: torch.Tensor, sinks: torch.Tensor) -> Any:
        return attn(q, k, v, vs=VSIndices(vertical, slash), doc=documents, sinks=sinks,
                    blk=BlockIndices.from_mask(live, 16, 16))

    run, _ = compiled(call)
    for sinks in (torch.zeros(4), torch.ones(4)):
        assert torch.allclose(run(q, vertical, sinks), call(q, vertical, sinks))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients(backend: str, return_lse: bool) -> None:
    """Through AOTAutograd, with data of slots and of score modifiers."""
    attn = maskdsl.compile(TRIANGLE | VerticalSlash("vs"), backend=backend,
                           scores=[SinkLogits("sinks"), Bias("bias")])
    sinks = torch.randn(4, requires_grad=True)
    bias = torch.randn(1, 1, 30, 30)  # wants no gradient
    lists = VSIndices(torch.tensor([[[1, 5]]]), torch.tensor([[[0, 7, 20]]]))

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        made = attn(q, k, v, sinks=sinks, bias=bias, vs=lists, return_lse=return_lse)
        return made[0].square().sum() + made[1].sum() if return_lse else made.square().sum()

    run, _ = compiled(loss)
    results = []
    for call in (run, loss):
        leaves = inputs(30, grad=True)
        call(*leaves).backward()
        results.append([*(t.grad for t in leaves), sinks.grad])
        sinks.grad = None
    for ours, eager in zip(*results, strict=True):
        assert torch.allclose(ours, eager, atol=1e-5)


@pytest.mark.skipif(not interpreting(), reason="a GPU is here")
def test_gradients_of_kernels_can_be_refused_and_are_taken_once() -> None:
    q, k, v = inputs(20, grad=True)
    with pytest.raises(Exception, match="compiled without"):
        compiled(maskdsl.compile(TRIANGLE, backend="triton", backward=False))[0](q, k, v).sum()
    attn = maskdsl.compile(TRIANGLE, backend="triton", layout="blhd")
    leaves = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    out, _ = maskdsl.ops.attention(*leaves, [], attn._key, "", None, None, None, True)
    first, = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    assert torch.allclose(first, torch.autograd.grad(attn(*leaves).square().sum(), leaves[0])[0])
    with pytest.raises(errors.GradientError, match="gradient of a gradient"):
        first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_in_a_graph(backend: str) -> None:
    from torch.utils.checkpoint import checkpoint

    attn = maskdsl.compile(TRIANGLE, backend=backend)
    run, _ = compiled(lambda *t: checkpoint(attn, *t, use_reentrant=False).square().sum())
    leaves, eager = inputs(30, grad=True), inputs(30, grad=True)
    run(*leaves).backward()
    attn(*eager).square().sum().backward()
    for a, b in zip(leaves, eager, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


def test_functions_have_a_key_of_this_process() -> None:
    window = maskdsl.compile(Where(lambda b, h, q, k: q - k < 5), backend="torch")
    run, _ = compiled(lambda q, k, v: window(q, k, v))
    q, k, v = inputs(30)
    expected = maskdsl.compile(Window(5), backend="torch")(q, k, v)
    assert torch.allclose(run(q, k, v), expected)
    with pytest.raises(errors.SerializationError, match="another process"):
        maskdsl.ops.find("#99999")


class Layer(torch.nn.Module):
    """One attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = maskdsl.compile(TRIANGLE, backend="torch", scores=Softcap(4.0))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attn(q, k, v)
        return out


def test_export(tmp_path: Path) -> None:
    """An exported program runs at other lengths, and in a process that never saw the mask."""
    length = torch.export.Dim("length", min=2, max=4096)
    sizes = ({2: length},) * 3
    program = torch.export.export(Layer(), tuple(inputs(32)), dynamic_shapes=sizes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "maskdsl.attention.default" in targets
    q, k, v = inputs(50)
    expected = Layer()(q, k, v)
    assert torch.allclose(program.module()(q, k, v), expected)
    torch.export.save(program, tmp_path / "layer.pt2")
    torch.save([q, k, v, expected], tmp_path / "tensors.pt")
    code = ("import torch, maskdsl\n"
            "q, k, v, expected = torch.load('tensors.pt')\n"
            "out = torch.export.load('layer.pt2').module()(q, k, v)\n"
            "print(torch.allclose(out, expected))")
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, text=True,
                         capture_output=True, check=False)
    assert run.stdout == "True\n", run.stderr[-2000:]


@pytest.mark.parametrize("graph", [False, True])
def test_autocast_casts_as_for_sdpa(graph: bool) -> None:
    attn = maskdsl.compile(Causal(), backend="torch")
    q, k, v = inputs(40)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attn(q, k.bfloat16(), v)

    out = (compiled(call)[0] if graph else call)(q, k, v)
    exact = attn(*(t.bfloat16() for t in (q, k, v)))
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact)


def test_data_taken_apart_comes_back() -> None:
    index = torch.zeros(1, 1, 3, 2, dtype=torch.int32)
    data = {"b": BlockIndices.from_topk(index, 16, 16), "t": maskdsl.TokenIndices(index),
            "s": torch.zeros(4), "c": BlockIndices.from_csr(torch.tensor([0, 1]),
                                                            torch.tensor([0]), 16, 16)}
    back = maskdsl.ops.put_together(*maskdsl.ops.take_apart(data))
    for name, value in data.items():
        if isinstance(value, torch.Tensor):
            assert back[name] is value
        else:
            assert type(back[name]) is type(value) and vars(back[name]) == vars(value)
    with pytest.raises(errors.MissingSlotError, match="graph can hold"):
        maskdsl.ops.take_apart({"x": 3})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing inductor
def test_inductor() -> None:
    attn = maskdsl.compile(TRIANGLE, backend="torch")

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(attn(q.sin(), k * 2, v)).sum(1)

    run = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (30, 40, 50):
        q, k, v = inputs(length)
        assert torch.allclose(run(q, k, v), layer(q, k, v), atol=1e-5)
