"""The comparison's runner, with fake timings and fake peers; and what it builds for real ones."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, peers
from benchmarks.cases import DEFAULT_CASES, Case, Pattern, choose_cases, parse_dim, parse_pattern
from benchmarks.peer_fa4 import block_lists
from benchmarks.peer_flex import mask_mod
from benchmarks.peer_fsa import stand_in
from benchmarks.plot import group_rows, plot_rows
from maskdsl import Causal, Shape
from maskdsl.dense import dense, dense_attention

sizes = st.integers(0, 40)
patterns = st.one_of(
    st.just(Pattern()),
    st.builds(Pattern, sink=sizes, window=st.integers(1, 40), last=sizes))


def live_pairs(pattern, length):
    return dense(Causal() & pattern.mask, Shape(length, length)).reshape(length, length).bool()


@given(patterns, st.integers(41, 90))
def test_every_form_of_a_pattern_is_its_mask(pattern, length):
    want = live_pairs(pattern, length)
    assert torch.equal(pattern.live(length, 0, length, "cpu"), want)
    assert pattern.pairs(length) == int(want.sum())
    p, k = torch.arange(length)[:, None], torch.arange(length)[None]
    assert torch.equal(mask_mod(pattern, length)(0, 0, p, k), want)
    ends = pattern.intervals(length, "cpu").long()
    assert (ends[1:] >= ends[:-1]).all() and ends.min() >= 0 and ends.max() <= length
    got = k < ends[0][:, None]
    for start, stop in zip(ends[1::2], ends[2::2], strict=True):
        got = got | ((k >= start[:, None]) & (k < stop[:, None]))
    assert torch.equal(got, want)


@given(patterns, st.integers(41, 90), st.sampled_from([4, 8, 16]))
def test_block_lists_hold_the_live_tiles(pattern, length, tile):
    live, full = pattern.tiles(length, tile, "cpu")
    want = live_pairs(pattern, length)
    inside = torch.ones_like(want)
    pad = (0, -length % tile, 0, -length % tile)
    count, total = (torch.nn.functional.pad(m.int(), pad).unfold(0, tile, tile)
                    .unfold(1, tile, tile).sum((2, 3)) for m in (want, inside))
    assert torch.equal(live, count > 0)
    assert not (full & (count < total)).any()
    part_n, part, full_n, whole = block_lists(live, full)
    for i in range(len(live)):
        partial = part[0, 0, i, :int(part_n[0, 0, i])].tolist()
        complete = whole[0, 0, i, :int(full_n[0, 0, i])].tolist()
        assert sorted(partial + complete) == live[i].nonzero().flatten().tolist()
        assert all(full[i, n] for n in complete) and partial == sorted(partial)


def test_names_of_masks():
    for case in DEFAULT_CASES:
        assert parse_pattern(case.pattern.key) == case.pattern
    assert parse_pattern("sink-4-window-9") == Pattern(4, 9)
    for wrong in ("", "triangle-1-2", "window-", "densely"):
        with pytest.raises(ValueError, match="is no mask"):
            parse_pattern(wrong)


def test_choosing_cases():
    assert choose_cases([], [], [], []) == list(DEFAULT_CASES)
    assert {c.length for c in choose_cases(["dense"], [], [], [])} == {32768}
    assert [c.length for c in choose_cases(["window-7"], [], [], [])] == [32768, 131072]
    made = choose_cases(["dense", "window-7"], [1024], [(4, 1)],
                        [parse_dim("64"), parse_dim("192:128")])
    assert [(c.pattern.key, c.columns()["dim"]) for c in made] == [
        ("dense", 64), ("dense", "192/128"), ("window-7", 64), ("window-7", "192/128")]
    assert made[1].sizes == (1024, 4, 1, 192, 128) and made[0].sizes == (1024, 4, 1, 64)
    assert made[1].flops() == 2 * (192 + 128) * 4 * 1024 * 1025 / 2
    options = compare.parse(["--quick", "--lengths", "128K,512K", "--heads", "4:1"])
    assert {(c.length, c.heads, c.kv_heads) for c in compare.cases_of(options)} == {(131072, 4, 1)}
    with pytest.raises(SystemExit):
        compare.parse(["--peers", "nobody"])


class Fake(peers.Peer):
    key = name = "right"
    wrong = 0.0

    def expresses(self, pattern):
        return True

    def ready(self, case, tensors, deadline):
        q, k, v = tensors
        live = live_pairs(case.pattern, case.length)
        return peers.Prepared(
            lambda: (dense_attention(q, k, v, live, q.shape[3] ** -0.5)[0].transpose(1, 2)
                     + self.wrong, "lse"),
            blhd=True, mask_ms=0.5, mask_first_s=2.0, visited=case.length ** 2, settings="none")


class Wrong(Fake):
    key = name = "wrong"
    wrong = 0.1


class Nan(Fake):
    key = name = "nan"
    wrong = math.nan


class Failing(Fake):
    key = name = "failing"

    def ready(self, case, tensors, deadline):
        raise RuntimeError("no kernel in /usr/lib/somewhere/file.py for this")


class Dense(Fake):
    key = name = "dense only"

    def expresses(self, pattern):
        return pattern.window is None


class Fa3(peers.FlashAttention3, Fake):
    ready = Fake.ready


class Slow(Fake):
    key = name = "slow"

    def ready(self, case, tensors, deadline):
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue


def make_inputs(length, heads, kv_heads, dim):
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(1, h, length, dim, generator=generator)
                 for h in (heads, kv_heads, kv_heads))


def make_runner(others, clock, **more):
    return compare.Runner([peers.Ours(), *others], limit=20.0, time=clock, inputs=make_inputs,
                          check_length=48, **more)


CASE = Case(Pattern(3, 9, 5), 96, heads=4, kv_heads=2, dim=128)


def test_rows_from_fake_timings():
    times = iter([2.0, 4.0, 1.0, 8.0])  # ours, FA3's dense call, the right peer, FA3 dense again
    saved = []
    runner = make_runner([Fake(), Wrong(), Nan(), Failing(), Dense(), Fa3()],
                         lambda run: run() is not None and next(times),
                         save=lambda running, rows: saved.append(running and running["kernel"]))
    runner.run(CASE)
    rows = {row["kernel"]: row for row in runner.done}
    assert list(rows) == ["maskdsl", "right", "wrong", "nan", "failing"]
    flops = 4 * 128 * 4 * CASE.pattern.pairs(96)
    assert rows["maskdsl"]["tflops"] == pytest.approx(flops / 2.0 / 1e9)
    assert rows["right"] == {
        "mask": "triangle-3-9-5", "length": 96, "heads": "4/2", "dim": 128, "kernel": "right",
        "ms": 1.0, "tflops": pytest.approx(flops / 1e9), "ms_over_ours": 0.5,
        "visited_tflops": pytest.approx(4 * 128 * 96 ** 2 / 1e9), "times_dense_fa3": 4.0,
        "of_fa3_ideal": pytest.approx(4.0 * CASE.pattern.pairs(96) / Pattern().pairs(96)),
        "mask_ms": 0.5, "mask_first_s": 2.0, "settings": "none",
        "error": pytest.approx(0, abs=1e-5), "gap_to_ours": pytest.approx(0, abs=1e-5)}
    assert "wrong result" in rows["wrong"]["failed"] and "ms" not in rows["wrong"]
    assert "wrong result: nan" in rows["nan"]["failed"]
    assert rows["failing"]["failed"] == "RuntimeError: no kernel in file.py for this"
    assert saved[:3] == ["maskdsl", None, "right"] and saved[-1] is None


def test_what_is_there_is_not_measured_again():
    first = make_runner([Fake()], lambda run: 2.0)
    first.run(CASE)
    rows = json.loads(json.dumps(first.done))
    second = make_runner([Fake(), Wrong()], lambda run: pytest.fail("timed again"), done=rows)
    second.run(CASE)
    assert [row["kernel"] for row in second.done] == ["maskdsl", "right", "wrong"]


def test_a_row_has_a_time_limit():
    runner = make_runner([], lambda run: 1.0)
    runner.run(CASE)
    runner.peers.append(Slow())
    runner.limit = 0.5
    runner.run(CASE)
    assert [row["kernel"] for row in runner.done] == ["maskdsl", "slow"]
    assert runner.done[-1]["failed"] == "RowTimeout: stopped after 0.5 s"


def test_resuming(tmp_path):
    path = tmp_path / ".compare.state.json"
    rows = [{"kernel": "a", "ms": 1.0}, {"kernel": "b", "failed": "killed"}]
    (tmp_path / "compare.json").write_text(json.dumps({"rows": rows}))
    again, anew = (compare.parse(["--out", str(tmp_path), *more]) for more in (["--resume"], []))
    assert compare.first_state(again, path)["rows"] == rows[:1]
    assert compare.first_state(anew, path)["rows"] == []
    compare.write_state(path, compare.read_state(path) | {"rows": rows})
    assert compare.first_state(again, path)["rows"] == rows
    assert compare.first_state(anew, path)["rows"] == []


def test_no_row_begins_after_the_time_is_up():
    runner = make_runner([Fake()], lambda run: 1.0, until=0.0)
    runner.run(CASE)
    assert runner.done == []


def test_peers_say_what_they_cannot_express():
    triangle = Case(Pattern(8, 512, 128), 1024)
    for peer in peers.all_peers():
        assert isinstance(peer.missing(), str) and peer.name
        if peer.key in ("fa3", "sdpa-flash", "sdpa-cudnn"):
            assert peer.prepare(triangle, None, 0.0) is None
        assert peer.expresses(Pattern())
    assert [p.key for p in peers.choose_peers(["fa3"])] == ["ours", "fa3"]


def test_the_stand_in_leaves_no_trace():
    with stand_in():
        from triton_kernels.matmul_ogs import matmul_ogs
    assert "triton_kernels" not in sys.modules
    with pytest.raises(ImportError, match="not installed"):
        matmul_ogs()


def test_a_process_that_ends_costs_one_row(tmp_path, monkeypatch):
    """The worker "crashes" in the second row; a new one goes on behind it."""
    script = tmp_path / "worker.py"
    state = tmp_path / "state.json"
    script.write_text(
        "import json, os, sys, time\n"
        "path = sys.argv[1]\n"
        "state = json.load(open(path))\n"
        "def write(state):\n"  # at once, as the real worker does
        "    with open(path + '.new', 'w') as part: json.dump(state, part)\n"
        "    os.replace(path + '.new', path)\n"
        "done = [row['kernel'] for row in state['rows']]\n"
        "for name in ('a', 'b', 'c'):\n"
        "    if name in done: continue\n"
        "    row = {'kernel': name}\n"
        "    write(state | {'running': row, 'since': time.time()})\n"
        "    if name == 'b': os._exit(11)\n"
        "    state['rows'].append(row | {'ms': 1.0})\n"
        "    write(state | {'running': None})\n")
    compare.write_state(state, compare.read_state(state))
    start = compare.subprocess.Popen
    monkeypatch.setattr(compare.subprocess, "Popen",
                        lambda command: start([sys.executable, str(script), str(state)]))
    rows = compare.supervise(compare.parse([]), [], state)["rows"]
    assert rows == [{"kernel": "a", "ms": 1.0},
                    {"kernel": "b", "failed": "its process ended (11)"},
                    {"kernel": "c", "ms": 1.0}]


def test_picture(tmp_path):
    rows = [CASE.columns() | {"kernel": name, "ms": ms, "tflops": 10 / ms}
            for name, ms in (("maskdsl", 2.0), ("right", 1.0))]
    rows.append(CASE.columns() | {"kernel": "broken", "failed": "RuntimeError"})
    (group,) = group_rows(rows).values()
    assert [row["kernel"] for row in group] == ["right", "maskdsl"]
    assert plot_rows(rows, tmp_path / "a.png") and (tmp_path / "a.png").stat().st_size > 5000
    assert not plot_rows(rows[2:], tmp_path / "b.png")
