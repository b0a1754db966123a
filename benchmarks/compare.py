"""Ours beside every peer that is installed: `python -m benchmarks.compare` (see README.md here).

Two processes. The one you start keeps no GPU state: it watches another, which measures row after
row and writes each into a file. A peer that hangs, crashes, or breaks the CUDA context costs that
process and one row with its error; a new process goes on with the next row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import (
    DEFAULT_DIM,
    LONG,
    Case,
    Pattern,
    choose_cases,
    parse_dim,
    parse_heads,
    parse_length,
)
from benchmarks.measure import Report, current_commit, make_inputs, time_ms
from benchmarks.peers import FlashAttention3, Peer, Prepared, Tensors, choose_peers, sync

CHECK_LENGTH = 4096  # tokens of the comparison with float32 before a peer is timed
ERROR_LIMIT = 0.01   # relative, of bfloat16 outputs; right ones lie near 0.002
BROKEN = 75          # exit status of a process whose CUDA context is gone
KILL_FACTOR = 1.5    # a row that does not end by itself is killed after this many limits,
KILL_GRACE = 30.0    # and these seconds
PATHS = re.compile(r"(?:/[\w.+-]+){2,}/")
State = dict[str, Any]


class RowTimeout(BaseException):
    """A row took longer than its limit. No Exception, so that no peer swallows it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise RowTimeout in the block after so many seconds, as soon as Python code runs."""
    def stop(*_: Any) -> None:
        raise RowTimeout(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tell(error: BaseException) -> str:
    """An error on one line, short and without the machine's folders."""
    text = PATHS.sub("", " ".join(str(error).split()))
    short = text if len(text) < 240 else f"{text[:120]} ... {text[-120:]}"
    return f"{type(error).__name__}: {short}"


def reference(pattern: Pattern, tensors: Tensors) -> torch.Tensor:
    """Dense masked attention in float32, head by head: float32[1, H, L, D]."""
    q, k, v = (t.float() for t in tensors)
    share, length = q.shape[1] // k.shape[1], q.shape[2]
    live = pattern.live(length, 0, length, q.device)
    heads = []
    for h in range(q.shape[1]):
        scores = (q[:, h] @ k[:, h // share].mT) * q.shape[3] ** -0.5
        heads.append(scores.masked_fill(~live, float("-inf")).softmax(-1) @ v[:, h // share])
    return torch.stack(heads, 1)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| over all elements; head by head, which spares memory."""
    if out.shape != expected.shape:
        raise ValueError(f"the output is {tuple(out.shape)}, not {tuple(expected.shape)}")
    gap = norm = 0.0
    for h in range(out.shape[1]):
        want = expected[:, h].float()
        gap += float((out[:, h].float() - want).square().sum())
        norm += float(want.square().sum())
    return float((gap / max(norm, 1e-30)) ** 0.5)


@dataclass
class Runner:
    """Measures cases with peers, row by row.

    limit   seconds for a row, its compilation included
    until   `time.monotonic()` after which no further row is begun
    time    (function) -> milliseconds
    inputs  (length, heads, kv_heads, dim[, value_dim]) -> q, k, v
    done    rows there already (of a process that ended early)
    save    called with (running row or None, rows) before and after every row
    """

    peers: list[Peer]
    limit: float
    time: Callable[[Callable[[], Any]], float] = time_ms
    inputs: Callable[..., Tensors] = make_inputs
    check_length: int = CHECK_LENGTH
    until: float = math.inf
    done: list[dict[str, Any]] = field(default_factory=list)
    save: Callable[[State | None, list[dict[str, Any]]], None] = lambda running, rows: None
    checked: dict[Any, float] = field(default_factory=dict)
    dense_ms: dict[Case, float | None] = field(default_factory=dict)

    def run(self, case: Case) -> None:
        """All rows of one case."""
        tensors: Tensors | None = None
        expected: torch.Tensor | None = None
        for peer in self.peers:
            if self.find(case, peer) is not None or time.monotonic() > self.until:
                continue
            row = case.columns() | {"kernel": peer.name}
            self.save(row, self.done)  # first, so that whatever ends the process names its row
            if tensors is None:
                tensors = self.inputs(*case.sizes)
            ours = self.find(case, self.peers[0])
            if expected is None and ours is not None and "ms" in ours:
                expected = self.run_ours(case, tensors)
            found = self.measure(case, peer, tensors, expected)
            if found is not None:
                self.add(row | found)
            self.save(None, self.done)
            settle()

    def find(self, case: Case, peer: Peer) -> dict[str, Any] | None:
        """The row of this case and peer, if there is one."""
        wanted = case.columns() | {"kernel": peer.name}
        return next((r for r in self.done if all(r.get(k) == v for k, v in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, and print it."""
        self.done.append(row)
        Report("compare").add(**row)

    def run_ours(self, case: Case, tensors: Tensors) -> torch.Tensor:
        """Our output at full length, which the peers' outputs are held against."""
        made = self.peers[0].prepare(case, tensors, time.monotonic())
        assert made is not None
        return made.output(made.run()).clone()

    def measure(self, case: Case, peer: Peer, tensors: Tensors,
                expected: torch.Tensor | None) -> dict[str, Any] | None:
        """The measured columns of a row, or its error; None where the peer has no such mask."""
        deadline = time.monotonic() + self.limit / 2
        try:
            with time_limit(self.limit), torch.no_grad():
                error = self.check(case, peer, deadline)
                if error is None:
                    return None
                made = peer.prepare(case, tensors, deadline)
                assert made is not None
                gap = None if expected is None else \
                    relative_error(made.output(made.run()), expected)
                for wrong, where in ((error, f"float32 at {self.check_length} tokens"),
                                     (gap, "ours at full length")):
                    if wrong is not None and not wrong < ERROR_LIMIT:  # NaN is wrong, too
                        return {"failed": f"wrong result: {wrong:.3g} from {where}"}
                ms = self.time(made.run)
                return self.columns(case, peer, made, ms) | {
                    "error": error, **({} if gap is None else {"gap_to_ours": gap})}
        except (Exception, RowTimeout) as failure:  # any failure of a peer is a row
            return {"failed": tell(failure)}

    def check(self, case: Case, peer: Peer, deadline: float) -> float | None:
        """Relative error against float32 on a short call; None where the mask has no way."""
        small = case.at(case.pattern, min(case.length, self.check_length))
        if (small, peer.key) not in self.checked:
            tensors = self.inputs(*small.sizes)
            made = peer.prepare(small, tensors, deadline)
            if made is None:
                return None
            self.checked[small, peer.key] = relative_error(
                made.output(made.run()), reference(case.pattern, tensors))
        return self.checked[small, peer.key]

    def columns(self, case: Case, peer: Peer, made: Prepared, ms: float) -> dict[str, Any]:
        """What follows from one timing."""
        row: dict[str, Any] = {"ms": ms, "tflops": case.flops() / ms / 1e9}
        if made.visited is not None:
            row["visited_tflops"] = case.pair_flops * made.visited / ms / 1e9
        ours = self.find(case, self.peers[0])
        if ours is not None and "ms" in ours:
            row["ms_over_ours"] = ms / ours["ms"]
        base, dense = self.dense(case)
        if dense is not None:
            row["of_fa3_ideal"] = row["tflops"] / (base.flops() / dense / 1e9)
            if base.length == case.length:
                row["times_dense_fa3"] = dense / ms
        extra = {"mask_ms": made.mask_ms, "mask_first_s": made.mask_first_s,
                 "settings": made.settings or None}
        return row | {name: value for name, value in extra.items() if value is not None}

    def dense(self, case: Case) -> tuple[Case, float | None]:
        """(call, milliseconds) of dense FlashAttention 3 with these heads: at this length, or at
        128K for what is longer (its rate no longer grows); None where it is not there."""
        base = case.at(Pattern(), min(case.length, LONG))
        peer = next((p for p in self.peers if isinstance(p, FlashAttention3)), None)
        if base not in self.dense_ms:
            self.dense_ms[base] = None
            known = peer and self.find(base, peer)
            if known:
                self.dense_ms[base] = known.get("ms")
            elif peer is not None:
                made = peer.prepare(base, self.inputs(*base.sizes), time.monotonic())
                assert made is not None
                try:
                    self.dense_ms[base] = self.time(made.run)
                except Exception as error:  # the row itself is not to blame
                    print(f"dense {peer.name}: {tell(error)}", flush=True)
        return base, self.dense_ms[base]


def settle() -> None:
    """Give memory back; leave the process if the last row broke the CUDA context."""
    if not torch.cuda.is_available():
        return
    try:
        sync()
        torch.cuda.empty_cache()
    except Exception as error:
        print(f"the CUDA context is gone ({tell(error)}): going on in a new process", flush=True)
        os._exit(BROKEN)


def write_state(path: Path, state: State) -> None:
    """Replace the file that two processes share, at once."""
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(state))
    part.replace(path)


def read_state(path: Path) -> State:
    """Rows so far, the row in progress (or None) and since when, when to stop (both in seconds
    since the epoch), and what is known about the peers."""
    if path.exists():
        state: State = json.loads(path.read_text())
        return state
    return {"rows": [], "running": None, "since": 0.0, "until": math.inf, "about": {}}


def first_state(options: argparse.Namespace, path: Path) -> State:
    """The state to begin with. --resume takes an interrupted run as it stands, or the rows of a
    finished one without those that failed."""
    finished = options.out / f"{options.name}.json"
    if not options.resume:
        path.unlink(missing_ok=True)
    state = read_state(path) | {"running": None, "until": time.time() + 60 * options.minutes}
    if options.resume and not path.exists() and finished.exists():
        rows = json.loads(finished.read_text())["rows"]
        state["rows"] = [row for row in rows if "failed" not in row]
    return state


def work(options: argparse.Namespace, state_file: Path) -> None:
    """The measuring process."""
    state = read_state(state_file)
    chosen = choose_peers(options.peers)
    absent = {peer.name: why for peer in chosen if (why := peer.missing())}
    peers = [peer for peer in chosen if peer.name not in absent]
    state["about"] = {
        "kernels": ", ".join(f"{p.name} {p.version()}".strip() for p in peers),
        **({"not measured": "; ".join(f"{n} ({PATHS.sub('', w)[:160]})"
                                      for n, w in absent.items())} if absent else {})}

    def save(running: State | None, rows: list[dict[str, Any]]) -> None:
        write_state(state_file, state | {"rows": rows, "running": running, "since": time.time()})

    save(None, state["rows"])
    until = state["until"] - time.time() + time.monotonic()
    runner = Runner(peers, options.limit, done=state["rows"], save=save, until=until,
                    time=lambda run: time_ms(run, repeat_ms=50 if options.quick else 150))
    for case in cases_of(options):
        runner.run(case)


def watch(child: subprocess.Popen[bytes], state_file: Path, patience: float) -> str:
    """Wait for a measuring process to end; kill it when one row takes over `patience` seconds,
    and say so."""
    note = ""
    while child.poll() is None:
        time.sleep(0.2)
        state = read_state(state_file)
        if state["running"] and time.time() - state["since"] > patience:
            note = f"killed after {patience:.0f} s"
            child.kill()
            child.wait()
    return note


def supervise(options: argparse.Namespace, arguments: list[str], state_file: Path) -> State:
    """Start measuring processes until all rows are there; returns the last state."""
    command = [sys.executable, "-m", "benchmarks.compare", *arguments, "--worker"]
    patience = KILL_FACTOR * options.limit + KILL_GRACE
    while True:
        child = subprocess.Popen(command)
        try:
            note = watch(child, state_file, patience)
        finally:  # an interrupt here must not leave a process that measures on
            child.kill()
            child.wait()
        state = read_state(state_file)
        if state["running"] is not None:
            row = state["running"] | {"failed": note or f"its process ended ({child.returncode})"}
            Report("compare").add(**row)
            state |= {"rows": [*state["rows"], row], "running": None}
            write_state(state_file, state)
        elif child.returncode not in (0, BROKEN):
            raise SystemExit(child.returncode)
        elif child.returncode == 0:
            return state


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases asked for; --quick leaves out what is longer than 128K."""
    cases = choose_cases(options.only, options.lengths, options.heads, options.dims)
    return [case for case in cases if not options.quick or case.length <= LONG]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    def listed(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [read(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--only", type=listed(str), default=[], metavar="MASK,...",
                        help="dense, window-W, sink-S-window-W or triangle-S-W-N")
    parser.add_argument("--peers", type=listed(str), default=[], metavar="KEY,...",
                        help="portable, hopper, fa3, fa4, cudnn, fsa, flex, flex-tuned, "
                             "sdpa-flash, sdpa-cudnn; default all; ours is always measured")
    parser.add_argument("--lengths", type=listed(parse_length), default=[], metavar="32K,...")
    parser.add_argument("--heads", type=listed(parse_heads), default=[], metavar="32:8,...")
    parser.add_argument("--dims", type=listed(parse_dim), default=[],
                        metavar=f"{DEFAULT_DIM},192:128,...")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds for a row")
    parser.add_argument("--quick", action="store_true",
                        help="shorter timings, and nothing above 128K")
    parser.add_argument("--resume", action="store_true",
                        help="keep the rows of an earlier run on this machine, add the others")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="begin no row after so many; --resume goes on with the rest")
    parser.add_argument("--name", default="compare", help="of the files written")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--commit", default="", help="default: the checked-out commit")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        cases_of(options)
        choose_peers(options.peers)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure, then write JSON, Markdown and (where matplotlib is there) a picture."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    state_file = options.out / f".{options.name}.state.json"
    if options.worker:
        work(options, state_file)
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.compare needs a CUDA GPU, and there is none here")
    options.out.mkdir(parents=True, exist_ok=True)
    write_state(state_file, first_state(options, state_file))
    state = supervise(options, arguments, state_file)
    report = Report(options.name, rows=state["rows"], about=state["about"])
    report.save(options.out, options.commit or current_commit())
    state_file.unlink(missing_ok=True)
    from benchmarks.plot import plot_rows

    plot_rows(state["rows"], options.out / f"{options.name}.png")


if __name__ == "__main__":
    main()
