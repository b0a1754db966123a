"""The page judges pairs as Python does, and works in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from maskdsl import (
    BlockDiagonal,
    BlockIndices,
    Blocks,
    Causal,
    Chunk,
    Columns,
    Dilated,
    Document,
    Documents,
    LastQ,
    Mask,
    PerHead,
    Prefix,
    RandomBlocks,
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
)
from maskdsl.errors import MissingSlotError, PictureError

NODE = shutil.which("node")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
TRIANGLE = Causal() & (LastQ(6) | Sink(3) | Window(9))
MASKS = [
    TRIANGLE, ~TRIANGLE, Causal() - Window(4), Stride(5, 2) & Causal(), Chunk(7), Dilated(3, 4),
    RandomBlocks(4, 2, seed=1) | Sink(2), Vertical([1, 2, 30]) | Slash([0, 5, 17]),
    BlockDiagonal([5, 20, 100]), Where(lambda b, h, q, k: (q + k) % 3 == 0) & Causal(),
    Where(lambda b, h, q, k: abs(q // 4 - k // 4) <= 1)]
SHAPES = [Shape(40, 40), Shape(13, 37), Shape(37, 13), Shape(20, 30, 3, 50)]
VS = VSIndices(torch.tensor([[[3, 9, 9, -1]]]), torch.tensor([[[0, 1, 7, 99]]]))
BLK = BlockIndices.from_topk(torch.tensor([[[[0, -1], [0, 2], [1, 1]]]]), 16, 16)
SLOTTED: list[tuple[Mask, dict[str, Any]]] = [
    (Causal() & (Sink(2) | VerticalSlash("vs")), {"vs": VS}),
    (VerticalSlash("vs", "block64") & Causal(), {"vs": VS}),
    (Causal() & (Window(3) | Blocks("blk", 16, 16)), {"blk": BLK}),
    (~Columns("cols") | Window(2), {"cols": torch.tensor([[[1, 5]]])}),
    (Prefix("n"), {"n": torch.tensor([5])}),
    (Causal() & Document("doc"),
     {"doc": Documents.from_ids(torch.tensor([[0] * 9 + [1] * 20 + [2] * 11]))})]

PROGRAM = """
const text = require("fs").readFileSync(0, "utf8");
const bits = JSON.parse(text).map((call) => call.heads.map((one) => {
  const parts = compileHead(one), rows = [];
  let open = 0;  // boxes of dead pairs of which the bounds cannot say so
  for (let r = 0; r < call.q_len; r++) {
    let row = "";
    for (let k = 0; k < call.kv_len; k++)
      row += parts.some((part) => part.judge(pairBox(r + call.q_offset, k)) === 2) ? "#" : ".";
    rows.push(row);
  }
  const wrong = [];  // boxes of which the bounds say something false
  for (let r = 0; r < call.q_len; r += 5) for (let k = 0; k < call.kv_len; k += 3) {
    const r1 = Math.min(r + 8, call.q_len), k1 = Math.min(k + 6, call.kv_len);
    const box = { p0: r + call.q_offset, p1: r1 - 1 + call.q_offset, k0: k, k1: k1 - 1 };
    const state = Math.max(...parts.map((part) =>
      part.judge(box) === 1 && mayHold(part, box) === false ? 0 : part.judge(box)));
    const cells = rows.slice(r, r1).map((row) => row.slice(k, k1)).join("");
    const [some, dead] = [cells.includes("#"), cells.includes(".")];
    if ((state === 0 && some) || (state === 2 && dead)) wrong.push([r, k]);
    if (state === 1 && !some) open += 1;
  }
  return { rows, wrong, open };
}));
console.log(JSON.stringify(bits));
"""


def data_of(page: str) -> Any:
    found = re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_page_judges_as_python_does(project: Path) -> None:
    calls = [(mask, shape, {}) for mask in MASKS for shape in SHAPES]
    calls += [(RandomBlocks(3, 1, seed=1), shape, {}) for shape in SHAPES]
    calls += [(mask, shape, slots) for mask, slots in SLOTTED
              for shape in (Shape(40, 40), Shape(30, 35, 5))]
    pages = [data_of(mask.to_html(None, shape.q_len, shape.kv_len, q_offset=shape.q_offset,
                                  total_len=shape.total_len, slots=slots))
             for mask, shape, slots in calls]
    program = (project / "maskdsl" / "page_judge.js").read_text() + PROGRAM
    run = subprocess.run([str(NODE), "-e", program], input=json.dumps(pages), text=True,
                         capture_output=True, check=True)
    for (mask, shape, slots), (answer,) in zip(calls, json.loads(run.stdout), strict=True):
        live = dense(mask, shape, slots=slots)[0, 0].tolist()
        rows = ["".join("#" if x else "." for x in row) for row in live]
        assert answer["rows"] == rows, (mask, shape)
        assert answer["wrong"] == [], (mask, shape)
        if isinstance(mask, RandomBlocks):
            assert answer["open"] == 0


def test_a_page_is_small_whole_and_alone(tmp_path: Path) -> None:
    page = TRIANGLE.to_html(tmp_path / "mask.html", 1 << 20)
    assert (tmp_path / "mask.html").read_text() == page
    assert len(page) < 40_000
    assert not re.search(r"https?://|<link|src=|@import|/\*(DATA|JUDGE|VIEW)\*/", page)
    assert "</script>" not in Where(script).to_html(None, 8).split("application/json\">")[1][:80]


def script(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


script.__qualname__ = "</script><b>"


def test_heads_get_a_menu() -> None:
    data = data_of(PerHead([Causal(), Window(4), Causal()]).to_html(None, 16))
    assert [one["title"] for one in data["heads"]] == ["heads 0, 2", "head 1"]


def test_what_a_page_cannot_show_is_told() -> None:
    table = torch.zeros(64, dtype=torch.bool)
    with pytest.raises(PictureError, match="only runs in Python"):
        Where(lambda b, h, q, k: table[k]).to_html(None, 32)
    with pytest.raises(PictureError, match="no such head"):
        Causal().to_html(None, 32, heads=2, head=2)
    with pytest.raises(PictureError, match="nothing to draw"):
        Causal().to_html(None, 0)
    with pytest.raises(MissingSlotError):
        (Sink(4) | VerticalSlash("vs")).to_html(None, 32)


POKE = """<script>
const told = {};
const kindOf = (kind) => (kind === "wheel" ? WheelEvent : PointerEvent);
const send = (kind, x, y, more) => canvas.dispatchEvent(new (kindOf(kind))(kind, {
  clientX: x, clientY: y + canvas.getBoundingClientRect().top, bubbles: true, ...more }));
const start = home();
const inked = () => {
  const pixels = paint.getImageData(start.left + 4, start.top + 4, 300, 300).data;
  let n = 0;
  for (let i = 0; i < pixels.length; i += 4)
    n += pixels[i] + pixels[i + 1] + pixels[i + 2] < 690 && pixels[i + 3] > 0;
  return n;
};
const over = (row, key) => send("pointermove", LEFT + (key - view.key + 0.1) * view.scale,
  TOP + (row - view.row + 0.1) * view.scale);
told.whole = { scale: view.scale, inked: inked() };
told.place = { ...shownPlace(), wide, high, room: LEFT };
send("pointermove", start.left + 200, start.top + 100);
told.far = tip.hidden ? "" : tip.innerText;
send("pointermove", start.left - 2, start.top + 100);
told.beside = tip.hidden;
for (let i = 0; i < 60; i++) send("wheel", start.left + 1, start.top + 1, { deltaY: -300 });
told.nearby = Math.max(view.key, view.row);
send("pointerdown", LEFT + 9, TOP + 9);
send("pointermove", LEFT + 200000, TOP + 200000);
send("pointerup", LEFT + 200000, TOP + 200000);
told.near = { scale: view.scale, left: shownPlace().left - start.left,
  top: shownPlace().top - start.top };
over(20, 5);
told.dead = tip.innerText;
over(20, 1);
told.live = tip.innerText;
for (const tick of document.querySelectorAll("#legend input")) tick.click();
told.hidden_ink = inked();
for (const tick of document.querySelectorAll("#legend input")) tick.click();
document.onkeydown(new KeyboardEvent("keydown", { key: "0" }));
told.back = view.scale;
const result = document.createElement("pre");
result.id = "told";
result.textContent = JSON.stringify(told);
document.body.append(result);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    mask = Causal() & (LastQ(64) | Sink(4) | Window(8))
    page = mask.to_html(None, 1 << 20).replace("</body>", POKE)
    (tmp_path / "poked.html").write_text(page)
    run = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,800",
         "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "poked.html").as_uri()],
        capture_output=True, text=True, timeout=400, check=True)
    found = re.search(r'<pre id="told">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found, run.stdout[-2000:] + run.stderr[-2000:]
    told = json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert told["whole"]["scale"] < 1e-3  # all of a million tokens in the window
    assert told["whole"]["inked"] > 250  # the diagonal, though a pixel is 1300 tokens
    place = told["place"]
    assert place["left"] > place["room"]  # centred
    assert abs(place["left"] + place["right"] - place["wide"]) <= 1
    assert place["bottom"] <= place["high"]
    assert "keeps nothing" in told["far"]
    assert told["beside"]  # no pair, no words
    assert told["nearby"] < 4000  # where the pointer was, to a pixel or three
    assert told["near"] == {"scale": 48, "left": 0, "top": 0}  # the corner stays where it began
    assert "query 20, key 5: dead" in told["dead"]
    assert "✗ k <= 3" in told["dead"]
    assert "query 20, key 1: live" in told["live"]
    assert "kept by Sink(4)" in told["live"]
    assert "✓ k <= 3" in told["live"]
    assert told["hidden_ink"] == 0
    assert told["back"] == told["whole"]["scale"]
