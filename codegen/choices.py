"""Measured choices of tile sizes: timed once, kept in memory and in one file for each kind of call.

A file is written under a temporary name and renamed, like an emitted kernel, so processes can share
the folder: two that tune the same kind at once both time it, and the later file stays. A damaged
file is told by a warning, and its kind is tuned again. What failed to compile, or did not fit the
chip, stands in the file too, and is not tried again at other lengths.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from functools import lru_cache
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from maskdsl.codegen.build import read_or_none, replace_file, writable_folder
from maskdsl.codegen.hopper_cut import HopperConfig
from maskdsl.codegen.tune import Config
from maskdsl.errors import BackendError, ResourceError
from maskdsl.settings import cache_dir, debug

Setting = Config | HopperConfig
Run = Callable[[], object]
Timer = Callable[[Run], float]  # milliseconds of one run

MARGIN = 1.01  # the default stays where nothing beats it by more than noise; chosen, not measured


@dataclass(frozen=True, slots=True)
class Kind:
    """The calls that share a choice.

    program     hash of the kernel's text for one tile size: the mask, and how it is written
    mask        for readers of the file
    chip        architecture and name; versions: of what compiles
    kernels     "hopper", "portable" or "both": which may take the call
    align, tma  alignment of the strides in elements; whether the hardware can copy tiles
    group       query heads of a key/value head
    heads       batch size times query heads; like the lengths, in tokens, rounded up to a power of
                two
    """

    program: str
    mask: str
    chip: str
    versions: str
    kernels: str
    dtype: str
    head_dim: int
    value_dim: int
    align: int
    tma: bool
    group: int
    heads: int
    q_len: int
    kv_len: int

    @property
    def family(self) -> str:
        """A hash of all but the sizes that change from call to call."""
        fixed = {name: value for name, value in asdict(self).items()
                 if name not in ("heads", "q_len", "kv_len")}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def file_name(self) -> str:
        """Of the choice."""
        return f"{self.family}_{self.heads}x{self.q_len}x{self.kv_len}.json"


@dataclass(frozen=True, slots=True)
class Tuned:
    """A choice: the setting that runs calls of a kind.

    times   (setting, milliseconds) of all that ran, in the order of trial, the default first
    failed  (setting, why) of those that did not
    source  "timed" by this process, or "file": found in the cache folder
    """

    kind: Kind
    setting: Setting
    times: tuple[tuple[Setting, float], ...]
    failed: tuple[tuple[Setting, str], ...]
    source: str = field(compare=False)


class Tuner:
    """Chooses among settings; one for the process, since trials side by side disturb each other.

    timer  milliseconds of a function that launches one call
    """

    def __init__(self, timer: Timer) -> None:
        self.timer = timer
        self.known: dict[Kind, Tuned] = {}
        self._lock = threading.RLock()

    def choose(self, kind: Kind, candidates: tuple[Setting, ...],
               start: Callable[[Setting], Run], may_time: bool = True) -> Tuned:
        """The choice for a kind: known, from its file, or timed now.

        candidates  the default first
        start       makes the function to time; may raise what a compiler raises
        may_time    False raises a BackendError where candidates would have to be timed

        Errors: ResourceError where no candidate runs; what a candidate raises, unless it is that it
        did not compile or fit.
        """
        with self._lock:
            if kind not in self.known:
                found = read_choice(kind, candidates)
                if found is None and not may_time:
                    raise BackendError("autotune=True, and a call under CUDA graph capture",
                                       "nothing can be timed while a graph is captured, and no "
                                       "choice for calls of this kind is known",
                                       "one call with tensors of these sizes before the capture")
                self.known[kind] = found or self._time(kind, candidates, start)
            return self.known[kind]

    def _time(self, kind: Kind, candidates: tuple[Setting, ...],
              start: Callable[[Setting], Run]) -> Tuned:
        times: dict[Setting, float] = {}
        failed = known_failures(kind, candidates)
        for setting in candidates:
            if setting not in failed:
                try:
                    times[setting] = self.timer(start(setting))
                except Exception as error:
                    if not is_refusal(error):
                        raise
                    failed[setting] = first_line(error)
            told = f"{times[setting]:.4f} ms" if setting in times else failed[setting]
            debug(1, f"autotune {kind.mask}, {kind.heads} heads, {kind.q_len} x {kind.kv_len}: "
                     f"{setting} {told}")
        if not times:
            raise ResourceError(f"autotune=True on {kind.chip}", "none of the candidates compiles "
                                f"and fits: {'; '.join(dict.fromkeys(failed.values()))}",
                                "smaller head dimensions, or backend='torch'")
        made = Tuned(kind, pick_fastest(times, candidates[0]), tuple(times.items()),
                     tuple(failed.items()), "timed")
        debug(1, f"autotune chose {made.setting}")
        write_choice(made)
        return made


def pick_fastest(times: dict[Setting, float], default: Setting) -> Setting:
    """The fastest setting; the default where it is as fast but for noise."""
    best = min(times, key=lambda setting: times[setting])
    return default if times.get(default, float("inf")) <= times[best] * MARGIN else best


def is_refusal(error: Exception) -> bool:
    """Whether a candidate could not be compiled or does not fit the chip. Anything else, such as
    an illegal address or no memory for the output, is the caller's to see."""
    if isinstance(error, (OutOfResources, PTXASError, CompilationError, ResourceError)):
        return True
    return type(error) is RuntimeError and "PassManager::run failed" in str(error)


def first_line(error: Exception) -> str:
    """What an error says, short enough for a table."""
    text = error.wrong if isinstance(error, ResourceError) else str(error)
    return f"{type(error).__name__}: {(text.strip().splitlines() or [''])[0][:200]}"


# --- files ------------------------------------------------------------------------------------


def choices_folder() -> Path:
    """Where choices are kept; created."""
    return writable_folder(cache_dir() / "tuned")


def encode(setting: Setting) -> list[Any]:
    """A setting as JSON: Config(64, 64, 4, 3) --> ["triton", 64, 64, 4, 3]"""
    return ["triton" if isinstance(setting, Config) else "hopper", *astuple(setting)]


def write_choice(made: Tuned) -> None:
    """Keep a choice on disk; a folder that cannot be written is told by a warning."""
    text = json.dumps({
        "kind": asdict(made.kind), "choice": encode(made.setting),
        "ms": [[encode(setting), ms] for setting, ms in made.times],
        "failed": [[encode(setting), why] for setting, why in made.failed]}, indent=1)
    path = choices_folder() / made.kind.file_name
    try:
        replace_file(path, text)
    except OSError as error:
        warnings.warn(f"maskdsl could not write {path} ({error}): the choice of autotune=True is "
                      "kept for this process only", stacklevel=2)


def read_choice(kind: Kind, candidates: tuple[Setting, ...]) -> Tuned | None:
    """The choice in a kind's file; None where there is none, or it is damaged (with a warning)."""
    path = choices_folder() / kind.file_name
    if not path.exists():
        return None
    try:
        found = parse_choice(read_or_none(path) or "", kind, candidates)
    except (ValueError, KeyError, TypeError):
        warnings.warn(f"{path} is damaged: calls of its kind are tuned again", stacklevel=2)
        return None
    debug(1, f"autotune choice found: {found.setting} in {path}")
    return found


def parse_choice(text: str, kind: Kind, candidates: tuple[Setting, ...]) -> Tuned:
    """The choice in a file's text; a ValueError, KeyError or TypeError where it is not one."""
    known = {json.dumps(encode(setting)): setting for setting in candidates}
    found = json.loads(text)

    def setting_of(code: object) -> Setting:
        return known[json.dumps(code)]

    times = tuple((setting_of(code), float(ms)) for code, ms in found["ms"])
    failed = tuple((setting_of(code), str(why)) for code, why in found["failed"])
    choice = setting_of(found["choice"])
    if found["kind"] != asdict(kind) or choice not in dict(times) or \
            not all(isfinite(ms) and ms >= 0 for _, ms in times):
        raise ValueError(text)
    return Tuned(kind, choice, times, failed, "file")


def known_failures(kind: Kind, candidates: tuple[Setting, ...]) -> dict[Setting, str]:
    """What did not compile or fit at other lengths or numbers of heads."""
    codes = {json.dumps(encode(setting)): setting for setting in candidates}
    failed: dict[Setting, str] = {}
    for path in choices_folder().glob(f"{kind.family}_*.json"):
        try:
            listed = json.loads(read_or_none(path) or "")["failed"]
            failed |= {codes[json.dumps(code)]: str(why) for code, why in listed}
        except (ValueError, KeyError, TypeError):
            continue  # a damaged file: told when its own kind is asked for
    return failed


@lru_cache(maxsize=1)
def code_digest() -> str:
    """A hash of the compiler's own files, templates included: another text, another choice."""
    digest = hashlib.sha256()
    folder = files("maskdsl.codegen")
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith((".py", ".txt")):
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes())
    return digest.hexdigest()[:16]


def time_call(run: Run) -> float:
    """Median milliseconds of a launch on the current device, its L2 cache flushed before each."""
    return float(triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median"))
