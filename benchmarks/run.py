"""Run benchmarks: `python -m benchmarks.run forward dense million`; results as JSON and Markdown.

`compare` has options of its own: give them after `compare`, or run `python -m benchmarks.compare`.

Peers are measured where they are installed: FlexAttention is part of torch, FlashAttention 3 is
`pip install fa3-fwd`. Every row is written as soon as it is measured, so a run that is cut off
leaves what it had. `cost`, `compiled` and `ttft` also run without a GPU, at tiny sizes: a rehearsal
of their code, whose numbers say nothing (give `--out`, or they replace measured ones).
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from benchmarks.compare import main as compare
from benchmarks.measure import Report, current_commit

QUESTIONS = ("forward", "dense", "million", "cold", "host", "cpu", "sweep",
             "vertical_slash", "triangle", "estimate", "cost", "compare", "probe", "quality",
             "passkey", "ttft", "compiled", "backward", "backward_sweep",
             "hopper_configs", "coverage")


def main() -> None:
    """Run the questions asked for, each into its own files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="+", choices=QUESTIONS)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--commit", default="", help="default: the checked-out commit")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin nothing new of cost, "
                        "compiled, ttft, backward*, coverage and hopper_configs after so many "
                        "minutes each (default: no limit)")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.questions != ["compare"]:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for question in arguments.questions:
        if question == "compare":
            compare(["--out", str(arguments.out), "--commit", arguments.commit, *rest])
            continue
        report = Report(question, folder=arguments.out,
                        commit=arguments.commit or current_commit())
        if arguments.minutes:
            report.until = time.monotonic() + 60 * arguments.minutes
        importlib.import_module(f"benchmarks.{question}").run(report)
        report.save(arguments.out, report.commit)


if __name__ == "__main__":
    main()
