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
from maskdsl.atoms import Causal, Empty
from maskdsl.backends import BACKENDS
from maskdsl.bench import add_bench, positive, run_bench
from maskdsl.cells import default_length
from maskdsl.compare import compare_masks
from maskdsl.dynamic import SlotMask, slots_of
from maskdsl.errors import MaskDSLError
from maskdsl.expr import And, Mask, Not, Or, join
from maskdsl.heads import PerHead
from maskdsl.parse import parse
from maskdsl.show import draw_terminal
from maskdsl.version import VERSION

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
PICTURES = (".png", ".svg", ".pdf", ".html")
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
    show.add_argument("--head", type=int, default=0, help="which head of a PerHead mask, from 0")
    show.add_argument("--width", type=positive, help="characters (default: what fits)")
    show.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    explain = command(commands, "explain", "what a call costs: pairs, tiles, memory", run_explain)
    add_mask(explain, length=True)
    explain.add_argument("--heads", type=positive, default=1, help="query heads (default: 1)")
    explain.add_argument("--kv-heads", type=positive, help="key/value heads (default: --heads)")
    explain.add_argument("--head-dim", type=positive, default=128, help="default: %(default)s")
    explain.add_argument("--backend", choices=BACKENDS)
    explain.add_argument("--chip", help="count and predict what this chip would run, such as H100 "
                         "(default: count what runs here)")
    explain.add_argument("--json", action="store_true", help="print JSON")
    source = command(commands, "source", "print the Triton kernel", run_source)
    add_mask(source, length=False)
    source.add_argument("--backend", choices=BACKENDS)
    compare = command(commands, "compare", "masks beside one another", run_compare)
    compare.add_argument("masks", nargs="+", type=mask_text, metavar="MASK")
    compare.add_argument("--len", dest="length", type=tokens, metavar="N",
                         help="tokens, such as 4096 or 128K (default: the masks' own sizes)")
    compare.add_argument("--no-causal", action="store_true", help="take the masks as they stand")
    compare.add_argument("--json", action="store_true", help="print JSON")
    bench = command(commands, "bench", "time masks here, beside dense attention", run_bench)
    add_bench(bench, mask_text, tokens)
    doctor = command(commands, "doctor", "versions, GPU, cache, and what would run", run_doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


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
    """The mask as `compile` takes it, with slots empty: the command line has no data for them."""
    whole = mask if no_causal else Causal() & mask
    if slots_of(whole):
        names = ", ".join(map(repr, slots_of(whole)))
        print(f"note: drawn without {names}, whose data comes with a call", file=sys.stderr)
    return without_slots(whole)


def without_slots(mask: Mask) -> Mask:
    """Slot atoms replaced by Empty()."""
    if isinstance(mask, SlotMask):
        return Empty()
    if isinstance(mask, Not):
        return ~without_slots(mask.operand)
    if isinstance(mask, PerHead):
        return PerHead(tuple(map(without_slots, mask.masks)))
    if isinstance(mask, (Or, And)):
        args = tuple(map(without_slots, mask.args))
        return join(Or, args) if isinstance(mask, Or) else join(And, args)
    return mask


def run_show(args: argparse.Namespace) -> int:
    """Draw."""
    mask = seen_mask(args.mask, args.no_causal)
    length = args.length or default_length(mask)
    if args.out is None:
        colour = {"auto": None, "always": True, "never": False}[args.color]
        print(draw_terminal(mask, length, args.kv_len, head=args.head, width=args.width,
                            colour=colour))
        return OK
    if args.out.suffix.lower() == ".html":
        mask.to_html(args.out, length, args.kv_len)
    else:
        mask.plot(length, args.kv_len, by=args.by, path=args.out)
    print(args.out)
    return OK


def run_explain(args: argparse.Namespace) -> int:
    """Count."""
    attn = compile(args.mask, causal=not args.no_causal, backend=args.backend)
    told = attn.explain(args.length or default_length(attn.mask), args.kv_len, heads=args.heads,
                        kv_heads=args.kv_heads, head_dim=args.head_dim, chip=args.chip)
    print(json.dumps(as_plain(told), indent=1, default=str) if args.json else told)
    return OK


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
    told = compare_masks(masks, args.length or max(map(default_length, masks)))
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
