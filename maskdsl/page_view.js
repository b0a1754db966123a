const call = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("canvas"), tip = document.getElementById("tip");
const stage = document.getElementById("stage");
const paint = canvas.getContext("2d");
const heads = call.heads.map(compileHead);
const FAINTEST = 0.35, UNSURE = 0.12, LEFT = 76, TOP = 26, SIDE = 8;
let head = 0, ratio = 1, wide = 0, high = 0;
let view = null; // first key and row shown (fractions allowed), pixels a token

const fmt = (n) => Math.round(n).toLocaleString("en-US");
const parts = () => heads[head].filter((part) => part.shown);

// The place of the whole matrix, in pixels: as large as fits beside the axes, centred.
function home() {
  const scale = Math.min((wide - LEFT - SIDE) / call.kv_len, (high - TOP - SIDE) / call.q_len);
  const across = call.kv_len * scale, down = call.q_len * scale;
  const left = Math.max(LEFT, Math.round((wide - across) / 2));
  const top = Math.max(TOP, Math.round((high - down) / 2));
  return { scale, left, top, right: left + across, bottom: top + down };
}

function fit() {
  const { scale, left, top } = home();
  view = { key: (LEFT - left) / scale, row: (TOP - top) / scale, scale };
}

// However near, the matrix covers at least its place as a whole: zooming holds what is under the
// pointer, up to its borders.
function clampView() {
  const { scale, left, top, right, bottom } = home();
  view.scale = Math.min(Math.max(view.scale, scale), Math.max(48, scale));
  const between = (x, low, most) => Math.max(Math.min(x, most), low);
  view.key = between(view.key, (LEFT - left) / view.scale, call.kv_len - (right - LEFT) / view.scale);
  view.row = between(view.row, (TOP - top) / view.scale, call.q_len - (bottom - TOP) / view.scale);
}

// The pixels that show the matrix now.
function shownPlace() {
  const left = LEFT - view.key * view.scale, top = TOP - view.row * view.scale;
  return { left: Math.max(LEFT, left), right: Math.min(wide, left + call.kv_len * view.scale),
    top: Math.max(TOP, top), bottom: Math.min(high, top + call.q_len * view.scale) };
}

function zoom(factor, x, y) {
  const key = view.key + (x - LEFT) / view.scale, row = view.row + (y - TOP) / view.scale;
  view.scale *= factor;
  clampView();
  view.key = key - (x - LEFT) / view.scale;
  view.row = row - (y - TOP) / view.scale;
  clampView();
  draw();
}

// What a box of pairs shows: {dead}, {part} when one colour fills it, or {} when it must be split.
function look(box, shown) {
  let open = false;
  for (const part of shown) {
    const state = part.judge(box);
    if (state === 2) return { part };
    if (state === 1) open = true;
  }
  return open ? {} : { dead: true };
}

// A box of one block of pixels that no bound decides: 6 x 6 of its pairs. Where all are dead, the
// first operand that may keep one; none: null; where that is not known the share is -1.
function sample(box, shown) {
  const n = 6, counts = new Map();
  const rows = Math.min(n, box.p1 - box.p0 + 1), keys = Math.min(n, box.k1 - box.k0 + 1);
  let live = 0;
  for (let i = 0; i < rows; i++) for (let j = 0; j < keys; j++) {
    // the golden ratio spreads the keys so that periodic masks are not met in step
    const jitter = (i * 0.618034 + j * 0.381966) % 1;
    const p = box.p0 + Math.floor((i * (box.p1 - box.p0 + 1)) / rows);
    const k = keys < n ? box.k0 + j
      : box.k0 + Math.floor(((j + jitter) * (box.k1 - box.k0 + 1)) / keys);
    const part = shown.find((one) => one.judge(pairBox(p, k)) === 2);
    if (part) { live++; counts.set(part, (counts.get(part) || 0) + 1); }
  }
  let best = null, most = 0;
  for (const [part, count] of counts) if (count > most) { best = part; most = count; }
  if (best) return { part: best, share: live / (rows * keys) };
  const open = shown.filter((part) => part.judge(box) > 0 && mayHold(part, box) !== false);
  best = open.find((part) => mayHold(part, box)); // true: bounds of a part without jumps say so
  return best ? { part: best, share: 0 } : open.length ? { part: open[0], share: -1 } : null;
}

function fill(x, y, w, h, colour, share) {
  paint.globalAlpha = share < 0 ? UNSURE : FAINTEST + (1 - FAINTEST) * share;
  paint.fillStyle = colour;
  paint.fillRect(x, y, w, h);
}

// Pixels [x0, x1) x [y0, y1) of the picture, in blocks of `block` pixels at the finest.
function drawBox(x0, y0, x1, y1, block, shown) {
  const a = tokens(x0, x1, view.key, call.kv_len), b = tokens(y0, y1, view.row, call.q_len);
  if (!a || !b) return;
  const box = { p0: b[0] + call.q_offset, p1: b[1] + call.q_offset, k0: a[0], k1: a[1] };
  const seen = look(box, shown);
  if (seen.dead) return;
  const x = LEFT + x0, y = TOP + y0, w = x1 - x0, h = y1 - y0;
  if (seen.part) return fill(x, y, w, h, seen.part.colour, 1);
  if (w <= block && h <= block) {
    const found = sample(box, shown);
    return found && fill(x, y, w, h, found.part.colour, found.share);
  }
  const xm = w > block ? x0 + Math.ceil(w / 2 / block) * block : x1;
  const ym = h > block ? y0 + Math.ceil(h / 2 / block) * block : y1;
  for (const [l, r] of xm < x1 ? [[x0, xm], [xm, x1]] : [[x0, x1]]) {
    for (const [t, u] of ym < y1 ? [[y0, ym], [ym, y1]] : [[y0, y1]]) drawBox(l, t, r, u, block, shown);
  }
}

// The tokens that begin in pixels [a, b): [first, last], or null outside the call.
function tokens(a, b, start, size) {
  const first = Math.max(0, Math.ceil(start + a / view.scale - 1e-9));
  const last = Math.min(size, Math.ceil(start + b / view.scale - 1e-9)) - 1;
  return first <= last ? [first, last] : null;
}

// Single pairs, when each is at least a few pixels wide.
function drawPairs(shown) {
  const s = view.scale;
  const row0 = Math.max(0, Math.floor(view.row)), key0 = Math.max(0, Math.floor(view.key));
  const row1 = Math.min(call.q_len, Math.ceil(view.row + (high - TOP) / s));
  const key1 = Math.min(call.kv_len, Math.ceil(view.key + (wide - LEFT) / s));
  const gap = s >= 8 ? 1 : 0;
  for (let r = row0; r < row1; r++) for (let k = key0; k < key1; k++) {
    const part = shown.find((one) => one.judge(pairBox(r + call.q_offset, k)) === 2);
    const x = LEFT + (k - view.key) * s, y = TOP + (r - view.row) * s;
    if (part) fill(x, y, s - gap, s - gap, part.colour, 1);
    else if (gap) { paint.globalAlpha = 1; paint.fillStyle = "#f1f1f1"; paint.fillRect(x, y, s - gap, s - gap); }
  }
}

function tickStep(scale) {
  let step = 1;
  while (step * scale < 70) step *= 2;
  return step;
}

function drawAxes({ left, right, top, bottom }) {
  paint.globalAlpha = 1;
  paint.strokeStyle = "#bbb";
  paint.strokeRect(left - 1.5, top - 1.5, Math.min(wide - 1, right) - left + 3,
    Math.min(high - 1, bottom) - top + 3);
  paint.fillStyle = "#555";
  paint.font = "11px ui-monospace, monospace";
  const step = tickStep(view.scale), half = view.scale >= 4 ? view.scale / 2 : 0;
  const first = (start) => Math.ceil(Math.max(0, start) / step) * step;
  paint.textAlign = "center";
  for (let k = first(view.key); k < call.kv_len; k += step) {
    const x = LEFT + (k - view.key) * view.scale + half;
    if (x > wide - 10) break;
    paint.fillText(fmt(k), x, top - 12);
    paint.fillRect(x, top - 8, 1, 5);
  }
  paint.textAlign = "right";
  for (let r = first(view.row); r < call.q_len; r += step) {
    const y = TOP + (r - view.row) * view.scale + half;
    if (y > high - 4) break;
    paint.fillText(fmt(r + call.q_offset), left - 9, y + 4);
    paint.fillRect(left - 7, y, 4, 1);
  }
}

function drawTiles({ left, right, top, bottom }) {
  const [rows, keys] = call.tile;
  if (Math.min(rows, keys) * view.scale < 24) return;
  paint.globalAlpha = 0.35;
  paint.fillStyle = "#000";
  for (let k = Math.ceil(Math.max(0, view.key) / keys) * keys; k <= call.kv_len; k += keys) {
    const x = LEFT + (k - view.key) * view.scale;
    if (x > wide) break;
    paint.fillRect(x - 0.5, top, 1, bottom - top);
  }
  for (let r = Math.ceil(Math.max(0, view.row) / rows) * rows; r <= call.q_len; r += rows) {
    const y = TOP + (r - view.row) * view.scale;
    if (y > high) break;
    paint.fillRect(left, y - 0.5, right - left, 1);
  }
}

function draw() {
  paint.setTransform(ratio, 0, 0, ratio, 0, 0);
  paint.clearRect(0, 0, wide, high);
  const shown = parts(), place = shownPlace();
  paint.save(); // blocks of pixels may reach over the borders
  paint.beginPath();
  paint.rect(place.left, place.top, place.right - place.left, place.bottom - place.top);
  paint.clip();
  if (view.scale >= 4) drawPairs(shown);
  else if (shown.length) {
    const size = 64, block = 2;
    for (let y = 0; y < high - TOP; y += size) for (let x = 0; x < wide - LEFT; x += size) {
      drawBox(x, y, Math.min(x + size, Math.ceil(wide - LEFT)), Math.min(y + size, Math.ceil(high - TOP)), block, shown);
    }
  }
  paint.restore();
  drawTiles(place);
  drawAxes(place);
  const one = 1 / view.scale;
  document.getElementById("scale").textContent =
    one >= 1 ? `a pixel is ${one < 10 ? one.toFixed(1) : fmt(one)} tokens` : `a pair is ${view.scale.toFixed(1)} pixels`;
}

const escapeText = (text) => text.replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

// Why a pair is live or dead: every operand, its atoms, and the comparisons they make.
function explainPair(p, k) {
  const box = pairBox(p, k), lines = [];
  const keeper = heads[head].find((part) => part.judge(box) === 2);
  lines.push(`<b>query ${fmt(p)}, key ${fmt(k)}: ${keeper ? "live" : "dead"}</b>`);
  for (const part of heads[head]) {
    const live = part.judge(box) === 2;
    lines.push(`<span style="color:${part.colour}">■</span> ${live ? "kept by" : "not by"} ${escapeText(part.name)}`);
    const told = new Set(part.atoms.flatMap((atom) => atom.tests.map((test) =>
      `    ${test.judge(box) === 2 ? "✓" : "✗"} ${escapeText(test.text)}`)));
    lines.push(...told);
  }
  return lines.join("\n");
}

// A box of many pairs: what each operand keeps of it.
function explainBox(box) {
  const words = ["nothing", "perhaps some", "all"];
  const kept = (part) => (part.judge(box) === 1 && mayHold(part, box) === false ? 0 : part.judge(box));
  const range = (a, b) => (a === b ? fmt(a) : `${fmt(a)}-${fmt(b)}`);
  return [`<b>queries ${range(box.p0, box.p1)}, keys ${range(box.k0, box.k1)}</b>`,
    ...heads[head].map((part) => `<span style="color:${part.colour}">■</span> ${escapeText(part.name)} keeps ${words[kept(part)]}`)].join("\n");
}

function hover(x, y) {
  const key = view.key + (x - LEFT) / view.scale, row = view.row + (y - TOP) / view.scale;
  const outside = key < 0 || row < 0 || key >= call.kv_len || row >= call.q_len;
  if (x < LEFT || y < TOP || outside) { tip.hidden = true; return; }
  const n = Math.max(1, Math.round(2 / view.scale)); // two pixels around the pointer
  const k = Math.floor(key), r = Math.floor(row);
  tip.innerHTML = view.scale >= 1 ? explainPair(r + call.q_offset, k)
    : explainBox({ p0: r + call.q_offset, p1: Math.min(r + n, call.q_len) - 1 + call.q_offset,
        k0: k, k1: Math.min(k + n, call.kv_len) - 1 });
  tip.hidden = false;
  tip.style.left = `${Math.max(0, x + 16 + tip.offsetWidth > wide ? x - 16 - tip.offsetWidth : x + 16)}px`;
  tip.style.top = `${Math.max(0, y + 16 + tip.offsetHeight > high ? y - 16 - tip.offsetHeight : y + 16)}px`;
}

function legend() {
  const place = document.getElementById("legend");
  place.replaceChildren(...heads[head].map((part) => {
    const label = document.createElement("label"), tick = document.createElement("input");
    const swatch = document.createElement("span");
    tick.type = "checkbox";
    tick.checked = part.shown;
    tick.onchange = () => { part.shown = tick.checked; draw(); };
    swatch.className = "swatch";
    swatch.style.background = part.colour;
    label.append(tick, swatch, part.name);
    label.style.marginRight = "10px";
    return label;
  }));
}

function resize() {
  const whole = !view || view.scale <= home().scale;
  ratio = window.devicePixelRatio || 1;
  wide = stage.clientWidth;
  high = stage.clientHeight;
  canvas.width = wide * ratio;
  canvas.height = high * ratio;
  if (whole) fit();
  clampView();
  draw();
}

let drag = null;
const at = (event) => { const r = canvas.getBoundingClientRect(); return [event.clientX - r.left, event.clientY - r.top]; };
canvas.onwheel = (event) => { event.preventDefault(); zoom(Math.exp(-event.deltaY / 300), ...at(event)); hover(...at(event)); };
canvas.onpointerdown = (event) => { drag = at(event); try { canvas.setPointerCapture(event.pointerId); } catch { /* a made-up pointer */ } };
canvas.onpointerup = () => { drag = null; };
canvas.onpointerleave = () => { tip.hidden = true; };
canvas.onpointermove = (event) => {
  const [x, y] = at(event);
  if (drag) {
    view.key -= (x - drag[0]) / view.scale;
    view.row -= (y - drag[1]) / view.scale;
    drag = [x, y];
    clampView();
    draw();
  }
  hover(x, y);
};
canvas.ondblclick = (event) => zoom(4, ...at(event));
const middle = () => { const at = home(); return [(at.left + at.right) / 2, (at.top + at.bottom) / 2]; };
const keysDown = {
  "+": () => zoom(2, ...middle()), "=": () => zoom(2, ...middle()), "-": () => zoom(0.5, ...middle()),
  "0": () => { fit(); draw(); },
  ArrowLeft: () => move(-1, 0), ArrowRight: () => move(1, 0), ArrowUp: () => move(0, -1), ArrowDown: () => move(0, 1),
};
function move(x, y) { view.key += (x * 80) / view.scale; view.row += (y * 80) / view.scale; clampView(); draw(); }
document.onkeydown = (event) => { const act = keysDown[event.key]; if (act) { event.preventDefault(); act(); } };
document.getElementById("whole").onclick = keysDown["0"];
document.getElementById("nearer").onclick = keysDown["+"];
document.getElementById("farther").onclick = keysDown["-"];
document.getElementById("tokens").onclick = () => zoom(16 / view.scale, ...middle());
document.title = call.mask;
document.getElementById("mask").textContent = call.mask;
document.getElementById("size").textContent =
  `${fmt(call.q_len)} queries x ${fmt(call.kv_len)} keys; wheel to zoom, drag to move, hover for why`;
const select = document.getElementById("heads");
select.hidden = heads.length < 2;
select.replaceChildren(...call.heads.map((one, i) => new Option(one.title, i)));
select.onchange = () => { head = Number(select.value); legend(); draw(); };
legend();
resize();
new ResizeObserver(resize).observe(stage); // the window, or the lines of the legend
