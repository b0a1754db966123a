"""What outlives the call it is made in."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maskdsl.codegen import kept
from maskdsl.codegen.kept import make_kept, nothing, remember


@pytest.mark.parametrize(("kind", "capturing", "elsewhere"), [
    ("cuda", False, True), ("cuda", True, False), ("cpu", False, False)])
def test_which_thread_makes_it(monkeypatch: pytest.MonkeyPatch, kind: str, capturing: bool,
                               elsewhere: bool) -> None:
    """On a GPU another one, where no graph's memory is in use; it is ready when it is handed over.
    What a capture makes belongs to its graph."""
    done: list[str] = []

    def stream(device: Any) -> Any:
        return SimpleNamespace(synchronize=lambda: done.append("ready"))

    def make() -> torch.Tensor:
        done.append("here" if threading.current_thread() is threading.main_thread() else "there")
        return torch.arange(3)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    made = make_kept(make, SimpleNamespace(type=kind))  # type: ignore[arg-type]
    assert made.tolist() == [0, 1, 2]
    assert done == (["there", "ready"] if elsewhere else ["here"])


def test_an_error_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def make() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make_kept(make, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]


def test_nothing_is_one_tensor_for_each_type() -> None:
    cpu = torch.device("cpu")
    assert nothing(torch.float32, cpu) is nothing(torch.float32, cpu)
    assert nothing(torch.int32, cpu).dtype == torch.int32 and nothing(torch.int32, cpu).numel() == 1


def test_remembered_until_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST", 3)
    known: dict[int, int] = {}
    made: list[int] = []

    def find(key: int) -> int:
        def make() -> int:
            made.append(key)
            return 10 * key

        return remember(known, key, make)

    assert [find(i) for i in (1, 2, 1, 3, 2)] == [10, 20, 10, 30, 20] and made == [1, 2, 3]
    assert find(4) == 40 and known == {4: 40}
    assert find(1) == 10 and made == [1, 2, 3, 4, 1]
