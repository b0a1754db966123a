"""The command line: results, exit codes, and where each goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskdsl import Causal, LastQ, Sink, Where, Window, bench, compile, doctor, explain
from maskdsl.cli import main
from maskdsl.compare import compare_masks

TRIANGLE = "Sink(4) | Window(2048) | LastQ(64)"
Out = pytest.CaptureFixture[str]


def test_show(capsys: Out) -> None:
    assert main(["show", TRIANGLE, "--len", "128K", "--width", "40"]) == 0
    out = capsys.readouterr().out
    assert "131,072 queries x 131,072 keys" in out
    assert "░░░" in out
    assert "\x1b" not in out  # not a terminal
    assert main(["show", "Window(2)", "--len", "4", "--no-causal", "--color", "always"]) == 0
    assert "\x1b[34m" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "begins"), [
    ("m.png", b"\x89PNG"), ("m.svg", b"<?xml"), ("m.html", b"<!doctype html>")])
def test_show_writes_files(name: str, begins: bytes, tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / name
    assert main(["show", TRIANGLE, "--len", "8K", "--out", str(path)]) == 0
    assert path.read_bytes().startswith(begins)
    assert capsys.readouterr().out == f"{path}\n"


def test_explain_and_source(capsys: Out) -> None:
    assert main(["explain", TRIANGLE, "--len", "32K"]) == 0
    assert "67,099,418" in capsys.readouterr().out
    assert main(["explain", TRIANGLE, "--len", "32K", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["live_pairs"] == 67_099_418
    assert main(["source", TRIANGLE, "--backend", "torch"]) == 0
    expected = compile(Sink(4) | Window(2048) | LastQ(64), backend="torch").source
    assert capsys.readouterr().out == expected + "\n"


def test_compare(capsys: Out) -> None:
    assert main(["compare", "Window(100)", "Sink(4) | Window(200)", "Band(300, 5)", "Stride(64)",
                 "--len", "4K"]) == 0
    out = capsys.readouterr().out
    assert "A < B: every pair of A is in B, at every length" in out
    assert "A and C share no pair" in out
    assert "~" not in out  # all are counted, the stride too
    assert main(["compare", "Window(3)", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"][0]["exact"]


def test_compare_counts_right() -> None:
    told = compare_masks([Causal() & Window(128), Causal()], 1024)
    assert told.masks[0].keys == pytest.approx(128 - 128 * 127 / 2 / 1024)
    assert told.masks[1].causal_share == 1
    assert told.masks[1].full == pytest.approx(28 / 64)
    assert told.masks[1].masked == pytest.approx(8 / 64)
    odd = Causal() & Where(lambda b, h, q, k: (q * q + k) % 3 == 0)
    told = compare_masks([odd], 1024)
    assert not told.masks[0].exact and str(told).count("~") == 1  # an estimate, marked
    assert told.masks[0].causal_share == pytest.approx(1 / 3, abs=0.01)
    assert "A = B" in str(compare_masks([Window(4) & Causal(), Window(4, 9) & Causal()], 64))


def test_bench(capsys: Out) -> None:
    command = ["bench", "Window(64)", "Causal()", "--len", "128", "256", "--repeat", "2",
               "--heads", "2", "--backend", "torch", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mask"], row["length"]) for row in rows] == [
        ("Window(64)", 128), ("Causal()", 128), ("Window(64)", 256),
        ("Causal()", 256)]
    assert all(row["least_ms"] <= row["median_ms"] and row["dense_ms"] > 0 for row in rows)
    assert main([*command, "--no-dense"]) == 0
    assert "dense/ms" in capsys.readouterr().out


def test_doctor(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine()
    missing = [p for p in report.problems if "is missing" in p]
    assert main(["doctor"]) == (1 if missing else 0)
    out = capsys.readouterr().out
    assert "difference to dense" in out
    assert "backend" in out
    monkeypatch.setattr(doctor, "TOLERANCE", dict.fromkeys(doctor.TOLERANCE, -1.0))
    assert main(["doctor", "--json"]) == 1
    assert "differs from dense attention" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [
    [], ["draw", "Sink(4)"], ["show"], ["show", "Sonk(4)"], ["show", "Sink(4)", "--len", "0"],
    ["show", "Sink(4)", "--len", "4X"], ["show", "Sink(4)", "--out", "x.gif"],
    ["bench", "Sink(4)", "--repeat", "0"], ["explain", "Sink(4)", "--heads", "-1"]])
def test_wrong_commands_exit_with_2(argv: list[str], capsys: Out) -> None:
    assert main(argv) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "usage: maskdsl" in told.err


def test_failures_exit_with_1_and_say_why(capsys: Out, tmp_path: Path) -> None:
    assert main(["bench", 'VerticalSlash("vs")', "--len", "64", "--no-dense"]) == 1
    told = capsys.readouterr()
    assert "MissingSlotError" in told.err
    assert "instead:" in told.err
    assert main(["show", "Sink(4)", "--out", str(tmp_path / "no" / "x.png")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_slots_are_drawn_empty_and_that_is_said(capsys: Out) -> None:
    assert main(["show", 'Window(2) | VerticalSlash("vs")', "--len", "4"]) == 0
    told = capsys.readouterr()
    assert "without VerticalSlash('vs')" in told.err
    assert [line.split()[-1] for line in told.out.splitlines()[2:]] == \
        (Causal() & Window(2)).picture(4).replace("#", "█").splitlines()


def test_help_and_version(capsys: Out) -> None:
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_as_a_program(project: Path) -> None:
    """The module runs, and a reader that leaves early is no error."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), *sys.path])}
    run = subprocess.run(f'{sys.executable} -m maskdsl.cli source "Sink(4)" | head -1',
                         shell=True, text=True, capture_output=True, env=env, check=True)
    assert run.stdout.startswith('"""Attention forward')
    assert "Traceback" not in run.stderr


def test_what_cannot_be_run_is_told_and_not_thrown(capsys: Out) -> None:
    for words, told in [
            (["bench", "Window(4)", "--device", "nosuch"], "torch cannot use it"),
            (["bench", "Window(4)", "--heads", "4", "--kv-heads", "3"], "must divide"),
            (["bench", "VerticalSlash('vs')", "--len", "64"], "the command line has none"),
            (["show", "PerHead([Window(3), Causal()])", "--head", "2", "--len", "8"],
             "no such head"),
            (["show", "Window(3)", "--rows", "5:2", "--len", "8"], "impossible part")]:
        assert main(words) == 1
        assert told in capsys.readouterr().err
    assert main(["show", "Window(3)", "--rows", "five"]) == 2
    assert "not a range" in capsys.readouterr().err


def test_heads_of_a_mask_are_its_own(capsys: Out) -> None:
    mask = "PerHead([Window(3), Causal()])"
    assert main(["explain", mask, "--len", "64", "--format", "markdown"]) == 0
    assert "2 query heads" in capsys.readouterr().out
    assert main(["bench", mask, "--len", "64", "--repeat", "1", "--backend", "torch",
                 "--device", "cpu"]) == 0
    assert "q [1, 2, L, 64]" in capsys.readouterr().out
    assert main(["show", mask, "--len", "8", "--head", "1"]) == 0
    assert "head 1 of 2" in capsys.readouterr().out


def test_a_part_is_shown(capsys: Out) -> None:
    assert main(["show", "Window(3) | Sink(2)", "--len", "128K", "--rows", "1000:1004", "--keys",
                 ":6"]) == 0
    out = capsys.readouterr().out
    assert "queries 1,000 to 1,003 of 131,072, keys 0 to 5 of 131,072, 33.3 % live" in out
    assert out.count("██····") == 4


def test_formats_of_explain(capsys: Out) -> None:
    for name, begins in (("text", "mask "), ("markdown", "| |"), ("html", "<table>"),
                         ("json", "{")):
        assert main(["explain", "Window(9)", "--len", "99", "--format", name]) == 0
        assert capsys.readouterr().out.startswith(begins)


def test_dense_that_does_not_run_is_left_out(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 4398046511104 bytes")

    monkeypatch.setattr(bench, "torch_dense", fails)
    assert main(["bench", "Window(9)", "--len", "64", "--repeat", "1", "--backend", "torch",
                 "--device", "cpu", "--json"]) == 0
    got = capsys.readouterr()
    assert json.loads(got.out)[0]["dense_ms"] is None
    assert "dense attention does not run: not enough memory" in got.err


def test_compare_predicts(capsys: Out) -> None:
    assert main(["compare", "Window(512)", "Causal()", "PerHead([Causal(), Causal()])",
                 "VerticalSlash('vs')", "--len", "32K", "--chip", "H100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    window, causal, heads, listed = told["masks"]
    assert window["ms"] < causal["ms"] == pytest.approx(told["dense_ms"])
    assert heads["ms"] < causal["ms"] and heads["dense_ms"] <= heads["ms"]
    assert listed["ms"] is None
    assert window["ms"] == pytest.approx(explain(Window(512), 32768, heads=32, kv_heads=8,
                                                 chip="H100").prediction.ms)
    assert main(["compare", "Window(4)", "--chip", "abacus"]) == 1
