"""The tuner with a fake timer: what it chooses, keeps, reads back, and tells when damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.errors import OutOfResources, PTXASError

from maskdsl.codegen.choices import Kind, Setting, Tuner, code_digest
from maskdsl.codegen.hopper import HopperConfig
from maskdsl.codegen.tune import Config
from maskdsl.errors import BackendError, ResourceError

KIND = Kind("0" * 24, "Causal()", "sm_90 a GPU", "maskdsl 0, triton 0, torch 0", "both", "bfloat16",
            128, 128, 16, True, 4, 32, 4096, 4096)
A, B, C = Config(64, 64, 4, 3), Config(128, 64, 8, 3), HopperConfig(4, 32, 3, 2)
ALL: tuple[Setting, ...] = (A, B, C)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKDSL_CACHE_DIR", str(tmp_path))
    return tmp_path / "tuned"


class Bench:
    """Settings with known times; a time that is an error is raised."""

    def __init__(self, *times: float | Exception) -> None:
        self.times = dict(zip(ALL, times, strict=True))
        self.tried: list[Setting] = []

    def start(self, setting: Setting) -> Callable[[], object]:
        self.tried.append(setting)
        return lambda: self.times[setting]

    @staticmethod
    def timer(run: Callable[[], object]) -> float:
        time = run()
        if isinstance(time, Exception):
            raise time
        assert isinstance(time, float)
        return time


def tune(bench: Bench, kind: Kind = KIND, tuner: Tuner | None = None, **more: Any) -> Any:
    return (tuner or Tuner(Bench.timer)).choose(kind, ALL, bench.start, **more)


@pytest.mark.parametrize(("times", "best"), [
    ((2.0, 1.0, 3.0), B), ((2.0, 3.0, 1.0), C), ((1.0, 2.0, 3.0), A),
    ((1.005, 1.0, 3.0), A), ((1.02, 1.0, 3.0), B)])
def test_the_fastest_wins_and_the_default_a_tie(times: tuple[float, ...], best: Setting) -> None:
    made = tune(Bench(*times))
    assert made.setting == best and dict(made.times) == dict(zip(ALL, times, strict=True))
    assert made.source == "timed" and not made.failed


def test_a_choice_is_timed_once_and_then_read(folder: Path) -> None:
    bench, tuner = Bench(2.0, 3.0, 1.0), Tuner(Bench.timer)
    first = tune(bench, tuner=tuner)
    assert tune(bench, tuner=tuner) is first and len(bench.tried) == 3
    again = tune(bench)  # another process
    assert again == first and again.source == "file" and len(bench.tried) == 3
    assert [path.name for path in folder.iterdir()] == [KIND.file_name]


@pytest.mark.parametrize("change", [
    {"q_len": 8192}, {"kv_len": 8192}, {"heads": 64}, {"dtype": "float16"}, {"head_dim": 64},
    {"group": 2}, {"chip": "sm_90 another"}, {"versions": "maskdsl 1"}, {"program": "1" * 24},
    {"tma": False}, {"align": 8}, {"kernels": "hopper"}])
def test_another_kind_is_timed_anew(change: dict[str, Any]) -> None:
    tune(Bench(2.0, 3.0, 1.0))
    other = tune(Bench(1.0, 3.0, 2.0), replace(KIND, **change))
    assert other.setting == A and other.source == "timed"
    assert tune(Bench(0.0, 0.0, 0.0)).setting == C  # and the first stays


@pytest.mark.parametrize("error", [
    OutOfResources(300000, 232448, "shared memory"), PTXASError("ptxas died"),
    ResourceError("a", "does not fit", "b"), RuntimeError("PassManager::run failed")])
def test_what_does_not_compile_is_skipped_and_remembered(error: Exception) -> None:
    bench = Bench(2.0, error, 3.0)
    made = tune(bench)
    assert made.setting == A and [setting for setting, _ in made.failed] == [B]
    assert type(error).__name__ in made.failed[0][1]
    other = Bench(3.0, 1.0, 2.0)  # B would win, if it were tried
    assert tune(other, replace(KIND, q_len=64)).setting == C and other.tried == [A, C]
    assert tune(other).failed == made.failed  # from the file


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"),
                                   ValueError("a bug"), MemoryError()])
def test_other_errors_are_raised(error: Exception, folder: Path) -> None:
    with pytest.raises(type(error)):
        tune(Bench(2.0, error, 3.0))
    assert not list(folder.glob("*.json"))


def test_nothing_runs(folder: Path) -> None:
    bad = OutOfResources(300000, 232448, "shared memory")
    with pytest.raises(ResourceError, match=r"none of the candidates.*shared memory"):
        tune(Bench(bad, bad, bad))
    assert not list(folder.glob("*.json"))


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        found = json.loads(text)
        change(found)
        return json.dumps(found)

    return apply


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:-20], lambda text: "[]", lambda text: "null",
    lambda text: '"text"', edit(lambda d: d.pop("ms")), edit(lambda d: d.update(failed=3)),
    edit(lambda d: d.update(choice=["triton", 48, 64, 4, 3])),
    edit(lambda d: d.update(choice=["triton"])), edit(lambda d: d.update(choice={"a": []})),
    edit(lambda d: d["kind"].update(head_dim=64)), edit(lambda d: d["ms"][0].append(1)),
    edit(lambda d: d["ms"].pop()), edit(lambda d: d["ms"][0].__setitem__(1, float("nan"))),
])
def test_a_damaged_file_is_told_and_tuned_again(damage: Callable[[str], str],
                                                folder: Path) -> None:
    tune(Bench(2.0, 3.0, 1.0))
    (path,) = folder.iterdir()
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match="is damaged"):
        made = tune(Bench(1.0, 2.0, 3.0))
    assert made.setting == A and made.source == "timed"
    assert tune(Bench(0.0, 0.0, 0.0)) == made  # the file is whole again


def test_bytes_that_are_no_text(folder: Path) -> None:
    tune(Bench(2.0, 3.0, 1.0))
    (path,) = folder.iterdir()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="is damaged"):
        assert tune(Bench(1.0, 2.0, 3.0)).setting == A


def test_under_capture_only_known_choices_serve() -> None:
    bench = Bench(2.0, 3.0, 1.0)
    with pytest.raises(BackendError, match="before the capture"):
        tune(bench, may_time=False)
    assert not bench.tried
    tune(bench)
    assert tune(bench, may_time=False).setting == C


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("maskdsl.codegen.choices.replace_file", fail)
    bench, tuner = Bench(2.0, 3.0, 1.0), Tuner(Bench.timer)
    with pytest.warns(UserWarning, match="no space left"):
        assert tune(bench, tuner=tuner).setting == C
    assert tune(bench, tuner=tuner).setting == C and len(bench.tried) == 3


def test_many_threads_time_once() -> None:
    bench, tuner = Bench(2.0, 3.0, 1.0), Tuner(Bench.timer)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: tune(bench, tuner=tuner), range(32)))
    assert all(one is made[0] for one in made) and len(bench.tried) == 3


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from dataclasses import replace
from test_choices import ALL, KIND, Bench, Tuner
for i in range(20):
    tuner = Tuner(Bench.timer)  # no memory: every choice is read or timed
    for n in (128, 256, 512):
        made = tuner.choose(replace(KIND, q_len=n), ALL, Bench(2.0, 3.0, 1.0).start)
        assert made.setting == ALL[2], made
    if i % 5 == {turn}:
        tuner._time(KIND, ALL, Bench(2.0, 3.0, 1.0).start)  # written while others read
"""


def test_processes_share_the_folder(folder: Path) -> None:
    program = PROGRAM.replace("{tests!r}", repr(str(Path(__file__).parent)))
    runs = [subprocess.Popen([sys.executable, "-W", "error::UserWarning", "-c",
                              program.replace("{turn}", str(turn))],
                             stderr=subprocess.PIPE, text=True) for turn in range(2)]
    told = [run.communicate()[1] for run in runs]  # all are waited for before anything can fail
    assert told == [""] * len(runs)
    assert all(run.returncode == 0 for run in runs)
    assert len(list(folder.glob("*.json"))) == 4 and not list(folder.glob("*.tmp"))


def test_what_was_tried_is_printed(monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MASKDSL_DEBUG", "1")
    tune(Bench(2.0, OutOfResources(9, 8, "shared memory"), 1.25))
    told = capsys.readouterr().err
    assert f"{A} 2.0000 ms" in told and f"{B} OutOfResources" in told and f"chose {C}" in told


def test_the_digest_covers_code_and_templates(tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        code_digest.cache_clear()
        return code_digest()

    monkeypatch.setattr("maskdsl.codegen.choices.files", lambda name: tmp_path)
    (tmp_path / "emit.py").write_text("one")
    (tmp_path / "forward.py.txt").write_text("one")
    seen = {digest(), digest()}
    (tmp_path / "emit.py").write_text("two")
    seen.add(digest())
    (tmp_path / "forward.py.txt").write_text("two")
    seen.add(digest())
    code_digest.cache_clear()
    assert len(seen) == 3
