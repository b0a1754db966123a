"use strict";
// The same arithmetic as maskdsl/raster.py: bounds of integer expressions over a box of pairs.
// An expression gives [low, high]; a condition 0 (no pair), 1 (some may) or 2 (all).

function floorDiv(a, b) { return Math.floor(a / b); }
function modulo(a, b) { return a - b * Math.floor(a / b); }

// How many of the sorted numbers lie below x.
function below(sorted, x) {
  let lo = 0, hi = sorted.length;
  while (lo < hi) { const mid = (lo + hi) >> 1; if (sorted[mid] < x) lo = mid + 1; else hi = mid; }
  return lo;
}

function boundOf(e, env) {
  if (typeof e === "number") return () => [e, e];
  if (e === "p") return (b) => [b.p0, b.p1];
  if (e === "k") return (b) => [b.k0, b.k1];
  if (typeof e === "string") { const x = env.names[e]; return () => [x, x]; }
  const [name, ...rest] = e;
  if (name === "lookup") {
    const table = env.tables[rest[0]], place = boundOf(rest[1], env);
    const read = (x) => table.values[below(table.starts, x + 1) - 1];
    return (b) => { const [lo, hi] = place(b); return [read(lo), read(hi)]; };
  }
  const parts = rest.map((x) => boundOf(x, env));
  if (name === "+") return (b) => {
    let lo = 0, hi = 0;
    for (const part of parts) { const [x, y] = part(b); lo += x; hi += y; }
    return [lo, hi];
  };
  if (name === "*") return (b) => parts.map((part) => part(b)).reduce(([a, c], [d, f]) => {
    const all = [a * d, a * f, c * d, c * f];
    return [Math.min(...all), Math.max(...all)];
  });
  if (name === "max" || name === "min") {
    const pick = name === "max" ? Math.max : Math.min;
    return (b) => parts.map((part) => part(b)).reduce(([a, c], [d, f]) => [pick(a, d), pick(c, f)]);
  }
  const [over, under] = parts;
  if (name === "//") return (b) => {
    const [lo, hi] = over(b), m = under(b)[0];
    return [floorDiv(lo, m), floorDiv(hi, m)];
  };
  return (b) => { // "%"
    const [lo, hi] = over(b), m = Math.max(1, under(b)[1]);
    return floorDiv(lo, m) === floorDiv(hi, m) ? [modulo(lo, m), modulo(hi, m)] : [0, m - 1];
  };
}

function countToState(count, all) { return count === 0 ? 0 : count === all ? 2 : 1; }

function lineState(sorted, lo, hi) {
  return countToState(below(sorted, hi + 1) - below(sorted, lo), hi - lo + 1);
}

// The lists of one slot: columns, slashes, and blocks by row of blocks.
function listState(slot) {
  return (b) => {
    let state = 0;
    if (slot.columns) state = Math.max(state, lineState(slot.columns, b.k0, b.k1));
    if (slot.slashes) state = Math.max(state, lineState(slot.slashes, b.p0 - b.k1, b.p1 - b.k0));
    if (slot.blocks) {
      const r0 = floorDiv(b.p0 - slot.offset, slot.size[0]);
      const r1 = floorDiv(b.p1 - slot.offset, slot.size[0]);
      const c0 = floorDiv(b.k0, slot.size[1]), c1 = floorDiv(b.k1, slot.size[1]);
      let count = 0;
      for (let r = r0; r <= r1; r++) {
        count += below(slot.blocks[r] || [], c1 + 1) - below(slot.blocks[r] || [], c0);
      }
      state = Math.max(state, countToState(count, (r1 - r0 + 1) * (c1 - c0 + 1)));
    }
    return state;
  };
}

function joinStates(parts, any) {
  const pick = any ? Math.max : Math.min, stop = any ? 2 : 0;
  return (b) => {
    let state = any ? 0 : 2;
    for (const part of parts) { state = pick(state, part(b)); if (state === stop) break; }
    return state;
  };
}

function judgeOf(c, env) {
  const [kind, ...rest] = c;
  if (kind === "ge") {
    const value = boundOf(rest[0], env);
    return (b) => { const [lo, hi] = value(b); return lo >= 0 ? 2 : hi >= 0 ? 1 : 0; };
  }
  if (kind === "has") return listState(env.slots[rest[0]]);
  if (kind === "not") { const inner = judgeOf(rest[0], env); return (b) => 2 - inner(b); }
  return joinStates(rest.map((x) => judgeOf(x, env)), kind === "or");
}

// [lo, hi] in pieces at whose ends formulas jump (maskdsl/grains.py); null where those are many.
function splitRange(lo, hi, grains, most = 8) {
  const marks = new Set([lo]);
  for (const [size, shift] of grains) {
    const first = floorDiv(lo + shift, size), last = floorDiv(hi + shift, size);
    if (last - first >= most) return null;
    for (let i = first + 1; i <= last; i++) marks.add(i * size - shift);
  }
  const starts = [...marks].sort((a, b) => a - b);
  return starts.map((start, i) => [start, i + 1 < starts.length ? starts[i + 1] - 1 : hi]);
}

// Whether a part of a box in which its own bounds decide nothing may hold a pair; undefined where
// there are too many parts to ask.
function mayHold(part, b) {
  const rows = splitRange(b.p0, b.p1, part.grains[0]), keys = splitRange(b.k0, b.k1, part.grains[1]);
  if (!rows || !keys) return undefined;
  return rows.some(([p0, p1]) => keys.some(([k0, k1]) => part.judge({ p0, p1, k0, k1 }) > 0));
}

function compileHead(head) {
  return head.parts.map((part) => ({
    name: part.name, colour: part.colour, shown: true, judge: judgeOf(part.condition, head.env),
    grains: part.grains,
    atoms: part.atoms.map((atom) => ({ name: atom.name, judge: judgeOf(atom.condition, head.env),
      tests: atom.tests.map(([text, c]) => ({ text, judge: judgeOf(c, head.env) })) })),
  }));
}

function pairBox(p, k) { return { p0: p, p1: p, k0: k, k1: k }; }
