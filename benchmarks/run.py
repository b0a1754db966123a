"""Run benchmarks: `python -m benchmarks.run forward dense million`; results as JSON and Markdown.

Peers are measured where they are installed: FlexAttention is part of torch, FlashAttention 3 is
`pip install fa3-fwd`.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks.measure import Report, current_commit

QUESTIONS = ("forward", "dense", "million", "cold", "host", "cpu", "sweep",
             "vertical_slash", "triangle", "estimate", "probe", "quality", "passkey", "ttft",
             "compiled")


def main() -> None:
    """Run the questions asked for, each into its own files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="+", choices=QUESTIONS)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--commit", default="", help="default: the checked-out commit")
    arguments = parser.parse_args()
    for question in arguments.questions:
        report = Report(question)
        importlib.import_module(f"benchmarks.{question}").run(report)
        report.save(arguments.out, arguments.commit or current_commit())


if __name__ == "__main__":
    main()
