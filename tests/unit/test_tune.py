"""Configs fit every chip by construction; what Triton really takes is checked in test_ahead.py."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdsl import Causal, LastQ, Sink, Where, Window
from maskdsl.codegen.autotune import hopper_candidates, portable_candidates
from maskdsl.codegen.planner import make_plan
from maskdsl.codegen.tune import (
    SHARED_BYTES,
    Config,
    fit_config,
    pick_config,
    shared_bytes,
    shared_limit,
)

CHIPS = [*SHARED_BYTES, "sm_130", "gfx942", "gfx90a", "gfx1100", "gfx1201"]
DIMS = st.integers(16, 256)


@given(st.sampled_from(CHIPS), DIMS, DIMS, st.sampled_from([2, 4]), st.sampled_from([0.0, 1e6]),
       st.sampled_from([0, 64, 128]))
def test_defaults_and_candidates_fit(chip: str, dim: int, value_dim: int, size: int, width: float,
                                     q_block: int) -> None:
    config = pick_config(chip, dim, value_dim, size, width, q_block).check()
    tried = portable_candidates(chip, dim, value_dim, size, config)
    assert tried[0] == config and len(set(tried)) == len(tried)
    for one in tried:
        assert shared_bytes(one.check(), chip, dim, value_dim, size) <= shared_limit(chip), one
    assert len(tried) >= 2


@given(st.sampled_from(CHIPS), DIMS, DIMS, st.sampled_from([2, 4]),
       st.builds(Config, st.sampled_from([16, 64, 256]), st.sampled_from([16, 64, 256]),
                 st.sampled_from([4, 8]), st.integers(1, 8)))
def test_any_config_is_made_to_fit(chip: str, dim: int, value_dim: int, size: int,
                                   config: Config) -> None:
    fitted = fit_config(config, chip, dim, value_dim, size).check()
    assert shared_bytes(fitted, chip, dim, value_dim, size) <= shared_limit(chip)
    for name in ("block_m", "block_n", "stages"):
        assert getattr(fitted, name) <= getattr(config, name)
    if shared_bytes(config, chip, dim, value_dim, size) <= shared_limit(chip):
        assert fitted == config


def test_measured_defaults_are_not_changed() -> None:
    """The configs measured on an H100 are those that run there."""
    assert pick_config("sm_90", 128, 128, 2, 1e6) == Config(128, 64, 8, 3)
    assert pick_config("sm_90", 128, 128, 2, 0.0) == Config(64, 64, 4, 3)
    assert pick_config("sm_90", 64, 64, 2, 1e6) == Config(64, 128, 4, 2)


def test_small_shared_memory_gets_less() -> None:
    wanted = Config(128, 64, 8, 3)
    assert fit_config(wanted, "sm_100", 128, 128, 2) == wanted
    assert fit_config(wanted, "sm_120", 128, 128, 2) == Config(128, 64, 8, 2)
    assert fit_config(wanted, "gfx942", 128, 128, 2) == Config(128, 64, 8, 2)
    assert fit_config(wanted, "sm_120", 256, 256, 4) == Config(64, 16, 8, 1)
    assert shared_limit("sm_135") == 101376 and shared_limit("gfx1300") == 65536


@pytest.mark.parametrize(("group", "packed"), [(8, {4, 2, 1}), (6, {2, 1}), (1, {1}), (3, {1})])
def test_hopper_candidates(group: int, packed: set[int]) -> None:
    found = hopper_candidates(Causal() & (Sink(8) | Window(512) | LastQ(128)), group, 128)
    assert {one.heads_packed for one in found} == packed
    assert len(set(found)) == len(found) == 3 * len(packed) + 1
    assert {one.narrow for one in found} == {32, 64, 128}
    assert {one.block_n for one in found} == {64, 128}


def test_heads_of_their_own_are_not_packed() -> None:
    mask = Causal() & Where(lambda b, h, q, k: q - k < 40 * (h + 1))
    assert make_plan(mask, 128, 32).needs_head
    assert {one.heads_packed for one in hopper_candidates(mask, 4, 128)} == {1}
