"""The command line: `maskdsl show "Sink(4) | Window(2048) | LastQ(64)" --len 128K`.

Exit codes: 0 done, 1 it failed (or `doctor` found a problem), 2 the command was written wrong,
130 interrupted. Results go to standard output, all else to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from maskdsl.api import compile
from maskdsl.atoms import Causal
from maskdsl.backends import BACKENDS
from maskdsl.bench import add_bench, positive, run_bench
from maskdsl.cells import default_length
from maskdsl.compare import compare_masks, without_slots
from maskdsl.dynamic import slots_of
from maskdsl.errors import MaskDSLError
from maskdsl.expr import Mask
from maskdsl.parse import parse
from maskdsl.show import draw_terminal
from maskdsl.version import VERSION

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
PICTURES = (".png", ".svg", ".pdf", ".html")
FORMATS = ("text", "json", "markdown", "html")
EPILOG = """\
A mask is written as in Python: atoms and patterns by name, | & ~ - between them. Quote it.

  maskdsl show "Sink(4) | Window(2048) | LastQ(64)" --len 128K
  maskdsl show "triangle()" --len 1M --out mask.html
  maskdsl explain "longformer(512, causal=True)" --len 32K
  maskdsl compare "Window(4096)" "Sink(4) | Window(2048)" --len 64K
  maskdsl bench "Sink(4) | Window(512)" --len 8K 16K
  maskdsl doctor
"""


def tokens(text: str) -> int:
    """4096, 128K or 1M as a number of tokens (K is 1024)."""
    found = re.fullmatch(r"(\d{1,12})([KkMm]?)", text.replace("_", "").replace(",", ""))
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length such as 4096, 128K or 1M")
    return int(found[1]) * UNITS[found[2].upper()]


def part(text: str) -> tuple[int, int]:
    """0:256 or 127K:128K as (first, last + 1)."""
    found = re.fullmatch(r"([^:]*):([^:]+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 0:256 or 127K:128K")
    return 0 if found[1] in ("", "0") else tokens(found[1]), tokens(found[2])


def mask_text(text: str) -> Mask:
    """The mask a text writes; argparse prints what is wrong with it."""
    try:
        return parse(text)
    except MaskDSLError as error:
        raise argparse.ArgumentTypeError(f"\n{error}") from error


def picture_path(text: str) -> Path:
    """A file name whose ending says what to write."""
    if Path(text).suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(PICTURES)}")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="maskdsl", description="Sparse-attention masks: see them, count them, time them.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"maskdsl {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = command(commands, "show", "draw a mask in the terminal, or into a file", run_show)
    add_mask(show, length=True)
    show.add_argument("--out", type=picture_path, metavar="FILE",
                      help=f"write a picture instead: {', '.join(PICTURES)}")
    show.add_argument("--by", choices=("source", "token", "tile"), default="source",
                      help="what colour tells, in a picture (default: %(default)s)")
    show.add_argument("--head", type=int, help="which head of a PerHead mask, from 0 (default: the "
                      "first; in a picture: all)")
    for name, told in (("--rows", "query rows"), ("--keys", "keys")):
        show.add_argument(name, type=part, metavar="A:B",
                          help=f"only these {told}, such as 0:256 or 127K:128K")
    show.add_argument("--width", type=positive, help="characters (default: what fits)")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                      help="default: %(default)s, in a terminal where NO_COLOR is not set")
    explain = command(commands, "explain", "what a call costs: pairs, tiles, memory", run_explain)
    add_mask(explain, length=True)
    add_heads(explain, heads=None, told="the mask's, or 1")
    explain.add_argument("--backend", choices=BACKENDS, help="default: what compile() picks here")
    explain.add_argument("--chip", help="count and predict what this chip would run, such as H100 "
                         "(default: count what runs here)")
    explain.add_argument("--format", choices=FORMATS, default="text",
                         help="default: %(default)s, in columns where `rich` is installed")
    explain.add_argument("--json", action="store_const", dest="format", const="json",
                         help="the same as --format json")
    source = command(commands, "source", "print the Triton kernel", run_source)
    add_mask(source, length=False)
    source.add_argument("--backend", choices=BACKENDS, help="default: what compile() picks here")
    compare = command(commands, "compare", "masks beside one another", run_compare)
    compare.add_argument("masks", nargs="+", type=mask_text, metavar="MASK",
                         help="as many as you like")
    compare.add_argument("--len", dest="length", type=tokens, metavar="N",
                         help="tokens, such as 4096 or 128K (default: the masks' own sizes)")
    compare.add_argument("--no-causal", action="store_true", help="take the masks as they stand")
    add_heads(compare, heads=32, kv_heads=8)
    compare.add_argument("--chip", help="predict times for this chip (default: the GPU here; "
                         "without one an H100)")
    compare.add_argument("--json", action="store_true", help="print JSON")
    bench = command(commands, "bench", "time masks here, beside dense attention", run_bench)
    add_bench(bench, mask_text, tokens)
    doctor = command(commands, "doctor", "versions, GPU, cache, and what would run", run_doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_heads(parser: argparse.ArgumentParser, heads: int | None, kv_heads: int | None = None,
              told: str = "") -> None:
    """The sizes of the call that is counted and predicted."""
    parser.add_argument("--batch", type=positive, default=1, help="default: %(default)s")
    parser.add_argument("--heads", type=positive, default=heads,
                        help=f"query heads (default: {told or heads})")
    parser.add_argument("--kv-heads", type=positive, help="key/value heads (default: "
                        f"{kv_heads or '--heads'})")
    parser.add_argument("--head-dim", type=positive, default=128, help="default: %(default)s")


def command(commands: Any, name: str, told: str, run: Any) -> argparse.ArgumentParser:
    """One subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=told, description=told[0].upper() + told[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_mask(parser: argparse.ArgumentParser, length: bool) -> None:
    """The mask and the call it is seen in."""
    parser.add_argument("mask", type=mask_text, metavar="MASK",
                        help='for example "Sink(4) | Window(2048)"')
    parser.add_argument("--no-causal", action="store_true",
                        help="take the mask as it stands, without Causal()")
    if length:
        parser.add_argument("--len", dest="length", type=tokens, metavar="N",
                            help="tokens, such as 4096, 128K, 1M (default: the mask's own sizes)")
        parser.add_argument("--kv-len", type=tokens, metavar="N", help="keys (default: --len)")


def seen_mask(mask: Mask, no_causal: bool) -> Mask:
    """The mask as `compile` takes it; the command line has no data for slots, and says so."""
    whole = mask if no_causal else Causal() & mask
    if slots_of(whole):
        names = ", ".join(map(repr, slots_of(whole)))
        print(f"note: seen without {names}, whose data comes with a call", file=sys.stderr)
    return whole


def run_show(args: argparse.Namespace) -> int:
    """Draw."""
    mask = without_slots(seen_mask(args.mask, args.no_causal))
    length = args.length or default_length(mask)
    if args.out is None:
        colour = {"auto": None, "always": True, "never": False}[args.color]
        print(draw_terminal(mask, length, args.kv_len, head=args.head or 0, width=args.width,
                            colour=colour, rows=args.rows, keys=args.keys))
        return OK
    if args.out.suffix.lower() == ".html":
        mask.to_html(args.out, length, args.kv_len)
    else:
        mask.plot(length, args.kv_len, by=args.by, path=args.out, head=args.head, rows=args.rows,
                  keys=args.keys)
    print(args.out)
    return OK


def run_explain(args: argparse.Namespace) -> int:
    """Count."""
    attn = compile(args.mask, causal=not args.no_causal, backend=args.backend)
    told = attn.explain(args.length or default_length(attn.mask), args.kv_len, batch=args.batch,
                        heads=args.heads, kv_heads=args.kv_heads, head_dim=args.head_dim,
                        chip=args.chip)
    if args.format == "json":
        print(json.dumps(as_plain(told), indent=1, default=str))
    elif args.format == "text":
        print_columns(told)
    else:
        print(told.markdown() if args.format == "markdown" else told._repr_html_())
    return OK


def print_columns(told: Any) -> None:
    """Lines that are folded to the terminal where there is one and `rich` is installed."""
    try:
        from rich.console import Console
    except ImportError:
        print(told)
        return
    console = Console()
    if console.is_terminal:
        console.print(told)
    else:
        print(told)


def as_plain(value: Any) -> Any:
    """A result as plain data for JSON."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def run_source(args: argparse.Namespace) -> int:
    """Print the kernel."""
    print(compile(args.mask, causal=not args.no_causal, backend=args.backend).source)
    return OK


def run_compare(args: argparse.Namespace) -> int:
    """Set masks beside one another."""
    masks = [seen_mask(mask, args.no_causal) for mask in args.masks]
    length = args.length or max(default_length(without_slots(mask)) for mask in masks)
    heads = args.kv_heads or (8 if args.heads % 8 == 0 else args.heads)
    told = compare_masks(masks, length, chip=args.chip, batch=args.batch, heads=args.heads,
                         kv_heads=heads, head_dim=args.head_dim)
    print(json.dumps(as_plain(told), indent=1) if args.json else told)
    return OK


def run_doctor(args: argparse.Namespace) -> int:
    """Look at the machine."""
    from maskdsl.doctor import examine

    report = examine()
    print(json.dumps(as_plain(report), indent=1) if args.json else report)
    return FAILED if report.problems else OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed usage and what is wrong
        return int(stop.code or 0)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except MaskDSLError as error:
        print(f"maskdsl {args.command}: {type(error).__name__}\n{error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `maskdsl source ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        print(f"maskdsl {args.command}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
