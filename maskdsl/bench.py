"""`maskdsl bench`: masks timed on this machine, beside dense causal attention in torch."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from maskdsl.api import Attention, compile
from maskdsl.backends import BACKENDS
from maskdsl.codegen.cost import ITEM_BYTES
from maskdsl.columns import format_number, format_table
from maskdsl.dynamic import slots_of
from maskdsl.errors import BackendError, HeadCountError, MissingSlotError
from maskdsl.explaining import Sizes, predict
from maskdsl.expr import Mask
from maskdsl.heads import count_heads
from maskdsl.shape import Shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one mask at one length; `dense_ms` of dense causal attention, None: skipped,
    or it does not fit into memory.

    first_ms      the first call, compilation included
    predicted_ms  what `explain` predicts for the GPU here; None: none here, or it was not measured
    """

    mask: str
    length: int
    backend: str
    median_ms: float
    least_ms: float
    first_ms: float
    dense_ms: float | None
    predicted_ms: float | None


def add_bench(parser: argparse.ArgumentParser, mask_text: Callable[[str], Mask],
              tokens: Callable[[str], int]) -> None:
    """The options of `maskdsl bench`."""
    parser.add_argument("masks", nargs="+", type=mask_text, metavar="MASK")
    parser.add_argument("--len", dest="lengths", nargs="+", type=tokens, metavar="N",
                        help="tokens (default: 8K on a GPU, 2K without)")
    for name, value, told in (("--batch", 1, "batch size"),
                              ("--heads", None, "query heads (default: the masks', or 8)"),
                              ("--kv-heads", None, "key/value heads (default: --heads)"),
                              ("--head-dim", 64, "head dimension"),
                              ("--repeat", None, "calls (default: 10 on a GPU, 3 without)")):
        parser.add_argument(name, type=positive, default=value,
                            help=told if "default:" in told else f"{told} (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="default: bfloat16 on a GPU, float32 without")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--backend", choices=BACKENDS, help="default: what compile() picks here")
    parser.add_argument("--no-causal", action="store_true", help="take the masks as they stand")
    parser.add_argument("--no-dense", action="store_true", help="leave dense attention out")
    parser.add_argument("--json", action="store_true", help="print JSON")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run_bench(args: argparse.Namespace) -> int:
    """Time every mask at every length, with a progress bar."""
    from tqdm import tqdm

    device = check_device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")]
    args.repeat = args.repeat or (10 if device.startswith("cuda") else 3)
    lengths = args.lengths or [8192 if device.startswith("cuda") else 2048]
    check_masks(args)
    attns = [compile(mask, causal=not args.no_causal, backend=args.backend) for mask in args.masks]
    rows: list[Timing] = []
    runs = len(lengths) * (len(attns) + (not args.no_dense)) * (args.repeat + 1)
    with tqdm(total=runs, unit="call", file=sys.stderr, disable=None) as bar, torch.no_grad():
        for length in lengths:
            inputs = make_inputs(args, length, device, dtype)
            dense = None
            if not args.no_dense:
                bar.set_description(f"dense at {length:,}")
                dense = time_dense(inputs, args.repeat, device, bar)
            for attn in attns:
                bar.set_description(f"{attn.mask!r} at {length:,}"[:60])
                rows.append(time_mask(attn, inputs, args.repeat, device, bar.update, dense))
    print(json.dumps([asdict(row) for row in rows], indent=1) if args.json else
          describe(rows, args, device, dtype))
    return 0


def check_device(asked: str | None) -> str:
    """The device to run on, or a BackendError where torch has none such."""
    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says so in both ways
        problem = str(error).splitlines()[0]
        raise BackendError(f"--device {device}", f"torch cannot use it: {problem}",
                           "--device cpu" if device != "cpu" else "no --device") from error
    return device


def check_masks(args: argparse.Namespace) -> None:
    """Fills in the numbers of heads; an error for masks that cannot be timed as they are asked."""
    for mask in args.masks:
        if slots_of(mask):
            raise MissingSlotError(f"maskdsl bench {str(mask)!r}", f"{slots_of(mask)[0]!r} needs "
                                   "data, and the command line has none", "Python: attn = compile("
                                   "mask), and time attn(q, k, v, ...) with the data")
    args.heads = args.heads or next(filter(None, map(count_heads, args.masks)), 8)
    args.kv_heads = args.kv_heads or args.heads
    if args.heads % args.kv_heads:
        raise HeadCountError(f"--heads {args.heads} --kv-heads {args.kv_heads}", "key/value heads "
                             "must divide the query heads", f"--kv-heads {args.heads}")


def make_inputs(args: argparse.Namespace, length: int, device: str, dtype: torch.dtype) -> Tensors:
    """Random q [B, H, L, D], k and v [B, Hkv, L, D]."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(args.batch, heads, length, args.head_dim, device=device, dtype=dtype)
               for heads in (args.heads, args.kv_heads, args.kv_heads))
    return q, k, v


def torch_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense causal attention of the torch that is installed."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                            enable_gqa=True)


def time_dense(inputs: Tensors, repeat: int, device: str, bar: Any) -> float | None:
    """Median milliseconds of dense attention; None, and a note, where it does not run."""
    try:
        return statistics.median(measure(partial(torch_dense, *inputs), repeat, device,
                                         bar.update)[1:])
    except (RuntimeError, MemoryError) as error:  # too long for this device
        bar.write(f"note: dense attention does not run: {str(error).splitlines()[0]}",
                  file=sys.stderr)
        bar.update(repeat + 1)
        return None


def measure(call: Callable[[], Any], repeat: int, device: str,
            tick: Callable[[], Any]) -> list[float]:
    """Milliseconds of the first call and of `repeat` more, the device waited for each time."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        tick()
    return times


def time_mask(attn: Attention, inputs: Tensors, repeat: int, device: str,
              tick: Callable[[], Any], dense: float | None) -> Timing:
    """One row."""
    first, *rest = measure(lambda: attn(*inputs), repeat, device, tick)
    return Timing(repr(attn.mask), inputs[0].shape[2], attn.backend, statistics.median(rest),
                  min(rest), first, dense, predict_ms(attn, inputs, device))


def predict_ms(attn: Attention, inputs: Tensors, device: str) -> float | None:
    """What `explain` predicts for the call on the GPU it runs on."""
    q, k, _ = inputs
    if not device.startswith("cuda") or q.element_size() != ITEM_BYTES:
        return None
    sizes = Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[3])
    found = predict(attn.compiled(), Shape(q.shape[2], k.shape[2]), sizes)
    return None if found is None else found.ms


def describe(rows: list[Timing], args: argparse.Namespace, device: str,
             dtype: torch.dtype) -> str:
    """The table, under a line that says what was measured."""
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else \
        f"CPU, {torch.get_num_threads()} threads"
    told = (f"{where}; q [{args.batch}, {args.heads}, L, {args.head_dim}], "
            f"{args.kv_heads} key heads, {str(dtype).removeprefix('torch.')}; "
            f"median of {args.repeat} calls, the host's part included")
    header = ("mask", "tokens", "backend", "ms", "least", "first call", "predicted", "dense ms",
              "dense/ms")
    table = [(row.mask, f"{row.length:,}", row.backend, *(map(format_number, (
        row.median_ms, row.least_ms, row.first_ms, row.predicted_ms, row.dense_ms,
        row.dense_ms / row.median_ms if row.dense_ms else None)))) for row in rows]
    slow = "" if device.startswith("cuda") else (
        "\nnote: without a GPU masks run on torch operations, which are right but not fast; what a "
        "kernel would take: maskdsl explain")
    return f"{told}\n{format_table(header, table)}{slow}"
