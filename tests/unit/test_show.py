"""Pictures in the terminal and with matplotlib: what they say, and that length costs nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskdsl import (
    BlockDiagonal,
    Causal,
    Document,
    Documents,
    FirstQ,
    LastQ,
    Mask,
    PerHead,
    QueryRange,
    Shape,
    Sink,
    Slash,
    Stride,
    Vertical,
    VerticalSlash,
    VSIndices,
    Where,
    Window,
    dense,
    plot_masks,
    plot_sparsity,
    save_picture,
)
from maskdsl.cells import Grid, default_length, find_sources, measure_cells, view_call
from maskdsl.errors import MissingSlotError, PictureError
from maskdsl.patterns import longnet, triangle, triangle_mix
from maskdsl.plot import PALETTE, blend, format_tokens
from maskdsl.plot_grid import format_runs, live_share
from maskdsl.show import draw_terminal
from maskdsl.tile_cells import measure_tiles

TRIANGLE = Causal() & (LastQ(64) | Sink(4) | Window(2048))
MILLION = 1 << 20


def image_of(figure: Any, panel: int = 0) -> np.ndarray:
    return np.asarray(figure.axes[panel].images[0].get_array())


def test_show_prints_one_character_a_pair_where_it_can(capsys: pytest.CaptureFixture[str]) -> None:
    mask = Causal() & (Sink(1) | Window(2))
    mask.show(6)
    picture = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert picture == mask.picture(6).replace("#", "█").splitlines()


def test_show_draws_thin_parts_of_long_calls() -> None:
    rows = [line.split()[-1] for line in
            draw_terminal(TRIANGLE, MILLION, width=64, colour=False).splitlines()[2:]]
    assert len(rows) == 32
    assert {len(row) for row in rows} == {64}
    assert all(row[0] == "░" for row in rows[1:])  # four keys of a million
    assert "·" not in rows[-1]  # 64 queries of a million
    assert all("·" in row for row in rows[:-1])


def test_show_colours_the_operands() -> None:
    text = draw_terminal(TRIANGLE, 8192, width=32, colour=True)
    assert "\x1b[34m█\x1b[0m LastQ(64)" in text
    assert "\x1b[33m░" in text


def test_show_of_nothing_is_told() -> None:
    with pytest.raises(PictureError, match="nothing to draw"):
        Causal().show(0)


@pytest.mark.parametrize(("mask", "length"), [
    (Sink(4), 32), (Window(2048) | Sink(4), 8192), (BlockDiagonal([10, 20]), 30),
    (Vertical([100, 300]), 2048), (Causal(), 32)])
def test_default_lengths(mask: Mask, length: int) -> None:
    assert default_length(mask) == length


@pytest.mark.parametrize("mask", [
    TRIANGLE, Causal() & (Stride(256) | Window(512)), Causal() & longnet(),
    Causal() & Slash(range(0, 9000, 300)), Causal() & Where(lambda b, h, q, k: (q + k) % 3 == 0)])
@pytest.mark.parametrize("by", ["source", "token", "tile"])
def test_a_million_tokens_in_seconds(mask: Mask, by: str) -> None:
    start = time.process_time()
    figure = mask.plot(MILLION, by=by)
    # of this process, so that other load does not count; 10**12 pairs would take hours
    assert time.process_time() - start < 20
    assert (image_of(figure) < 1).any()


def test_colours_tell_the_operand() -> None:
    mask = Causal() & (Sink(8) | Window(16))
    figure = mask.plot(64)
    image = image_of(figure)
    live = dense(mask, Shape(64, 64))[0, 0].numpy()
    assert ((image == 1).all(2) == ~live).all()
    colours = [blend([(c, np.ones((1, 1)), np.ones((1, 1), bool))])[0, 0] for c in PALETTE[:2]]
    assert np.allclose(image[40, 3], colours[0])  # Sink, the first operand in order
    assert np.allclose(image[40, 35], colours[1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Sink(8)", "Window(16)"]


def test_a_part_of_a_long_call() -> None:
    image = image_of(TRIANGLE.plot(MILLION, by="token", rows=(100_000, 100_064),
                                   keys=(99_990, 100_054)))
    live = dense(Causal(), Shape(64, 64, 10, 10_000))[0, 0].numpy()
    assert ((image < 1).any(2) == live).all()


@pytest.mark.parametrize("tile", [(8, 8), (16, 4)])
def test_tiles_are_those_of_the_dense_mask(tile: tuple[int, int]) -> None:
    mask, shape = Causal() & (Sink(3) | Window(20) | LastQ(5)), Shape(70, 90)
    grid = Grid.over((0, 70), (0, 90), 1000, 1000, tile)
    full, masked, some = measure_tiles(mask, grid, view_call(mask, shape), tile)
    live = dense(mask, shape)[0, 0].numpy()
    for i, r in enumerate(range(0, 70, tile[0])):
        for j, k in enumerate(range(0, 90, tile[1])):
            part = live[r:r + tile[0], k:k + tile[1]]
            assert full[i, j] <= part.all()  # by bounds: two operands together may fill it too
            assert masked[i, j] == some[i, j] == (part.any() and not full[i, j])
    assert full.sum() > 0


@pytest.mark.parametrize("mask", [LastQ(64), FirstQ(3), QueryRange(500_000, 500_010)])
def test_no_tile_with_a_live_pair_is_lost_from_afar(mask: Mask) -> None:
    shape = Shape(MILLION, MILLION)
    grid = Grid.over((0, MILLION), (0, MILLION), 100, 100, (128, 128))
    _, _, some = measure_tiles(Causal() & mask, grid, view_call(mask, shape), (128, 128))
    assert some.any(1).sum() == 1
    assert some.any(0).sum() > (0 if mask == FirstQ(3) else 40)


def test_call_time_data_is_drawn_from_lists() -> None:
    vs = VSIndices(torch.tensor([[[5, 700_000]]]), torch.tensor([[[0, 300_000]]]))
    mask = Causal() & VerticalSlash("vs")
    figure = mask.plot(MILLION, slots={"vs": vs})
    dark = (image_of(figure) < 1).any(2)
    column = 700_000 * 384 // MILLION
    assert dark[300:, column].all()  # one column of a million
    assert dark[:, 0].all()
    assert all(dark[i, i - 110:i - 108].any() for i in range(120, 384))  # one slash
    with pytest.raises(MissingSlotError):
        mask.plot(64)


def test_documents_and_offsets() -> None:
    doc = Documents.from_ids(torch.tensor([[0] * 30 + [1] * 34]))
    mask = Causal() & Document("doc")
    image = image_of(mask.plot(20, 64, slots={"doc": doc}, q_offset=40))
    live = dense(mask, Shape(20, 64, 40), slots={"doc": doc})[0, 0].numpy()
    assert ((image < 1).any(2) == live).all()


def test_heads_and_layers_as_grids(tmp_path: Path) -> None:
    mask = PerHead([Causal(), Window(8) & Causal(), Causal()])
    figure = mask.plot(32, path=tmp_path / "heads.png")
    assert [a.get_title(loc="left") for a in figure.axes] == ["heads 0, 2", "head 1"]
    assert (tmp_path / "heads.png").read_bytes()[:4] == b"\x89PNG"
    assert image_of(mask.plot(32, head=1)).shape == (32, 32, 3)
    layers = plot_masks(triangle_mix(6, [0, 1, 4]), 512)
    titles = [a.get_title(loc="left") for a in layers.axes if a.get_visible()]
    assert titles == ["layers 0-1, 4", "layers 2-3, 5"]
    with pytest.raises(PictureError, match="masks are needed"):
        plot_masks([3])
    with pytest.raises(PictureError, match="too small"):
        plot_masks({str(i): Causal() for i in range(200)})


def test_sparsity_over_length() -> None:
    odd = Where(lambda b, h, q, k: (q * q + k) % 64 == 0)  # tested pair by pair, no rows alike
    figure = plot_sparsity({"triangle": Causal() & triangle(), "odd": Causal() & odd,
                            "packed": BlockDiagonal([512, 512])}, [512, 1024, 4096])
    left = figure.axes[0].get_lines()
    assert [line.get_linestyle() for line in left] == ["-", "--", "-"]
    assert list(left[2].get_xdata()) == [512, 1024]  # not beyond what it is defined for
    live = int(dense(Causal() & triangle(), Shape(1024, 1024)).sum())
    assert left[0].get_ydata()[1] == pytest.approx(100 * live / (1024 * 1025 / 2))
    assert live_share(Causal() & Stride(64), 4096)[1]
    share, exact = live_share(Causal() & odd, 4096)
    assert not exact
    assert share == pytest.approx(1 / 64, rel=0.05)


def test_shares_of_coarse_cells_are_near() -> None:
    mask, shape = Causal() & (Window(100) | Stride(7)), Shape(2000, 2000)
    grid = Grid.over((0, 2000), (0, 2000), 20, 20)
    cells = measure_cells(mask, grid, view_call(mask, shape))
    exact = dense(mask, shape)[0, 0].float().reshape(20, 100, 20, 100).mean((1, 3)).numpy()
    assert np.abs(cells.share - exact).max() < 0.2
    assert abs(cells.share.mean() - exact.mean()) < 0.01


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(PictureError, match="by='source'"):
        Causal().plot(8, by="colour")
    with pytest.raises(PictureError, match="impossible part"):
        Causal().plot(8, rows=(4, 9))


def test_small_things(tmp_path: Path) -> None:
    assert [format_tokens(n) for n in (0, 100, 1024, 131072, MILLION)] == \
        ["0", "100", "1K", "128K", "1M"]
    assert format_runs([5, 0, 1, 2]) == "0-2, 5"
    assert Causal().plot(8)._repr_png_()[:4] == b"\x89PNG"
    assert save_picture(TRIANGLE, tmp_path / "m.svg", 64, 16).read_text().startswith("<?xml")
    sources = find_sources(Sink(2) | Sink(4), Grid.over((0, 8), (0, 8), 8, 8),
                           view_call(Causal(), Shape(8, 8)))
    assert sources.names == ("Sink(2)", "Sink(4)")
