// Tokens on the ruler of each layer, to scale. A token is dragged, or its gap made longer with the arrow keys; tokens
// after it move along. Only what is in sight is drawn, so that thousands of tokens stay light.

import { fill, html, marks, short, signed, svg, update, widthOf, written } from "./dom.js";

const TYPE = 15; // pixels
const HEIGHT = 74;
const AXIS = 44; // of a row, from its top
const PAD = 22;
const OVERLAP = 0.62;
const REACH = 12;
const SIGHT = 300; // drawn to either side of what is seen

export function rulers(app) {
  const scroller = html("div", { class: "lp-rulers lp-wide", scroll: () => requestAnimationFrame(() => ((seenAt.left = scroller.scrollLeft), redraw())) });
  const rows = [];
  const seenAt = { left: 0, width: 0, names: 0 }; // read when they change: to read them in a drawing lays the page out
  let [shorts, halves] = [[], []];
  let drag = null; // in hand, or let go while the answer to it is on its way
  let frozen = null; // the scales while something is dragged

  function build() {
    rows.length = 0;
    shorts = app.text.labels.map(short);
    halves = app.text.labels.map((label) => widthOf(label, TYPE) / 2);
    app.text.layers.forEach((layer, entry) => {
      const picture = svg("svg", {
        height: HEIGHT,
        tabindex: app.still ? null : 0,
        role: app.still ? "img" : "slider",
        keydown: (event) => onKey(event, entry),
        focus: () => app.take(layer, app.state.gap.token),
        pointerdown: (event) => onDown(event, entry),
        pointermove: onMove,
        pointerup: onUp,
        pointercancel: onUp,
        lostpointercapture: onUp,
      });
      rows.push({ layer, entry, picture, ...partsOf(picture), ...nameOf(layer) });
      const row = rows[entry];
      row.node = html("div", { class: "lp-ruler" }, row.name, picture);
    });
    scroller.replaceChildren(...rows.map((row) => row.node));
    seenAt.width = scroller.clientWidth;
    seenAt.names = rows[0].name.offsetWidth;
  }

  // What a ruler is drawn with, the last on top. It is made once: drawings write what has changed.
  function partsOf(picture) {
    const axis = svg("line", { x1: 0, y1: AXIS, y2: AXIS, class: "lp-axis" });
    const [grid, words] = [svg("g"), svg("g")];
    const gap = svg("line", { y1: AXIS, y2: AXIS });
    const lines = Object.fromEntries(["grid", "tick", "was", "way"].map((name) => [name, svg("path", { class: `lp-${name}` })]));
    picture.append(axis, grid, gap, ...Object.values(lines), words);
    return { axis, grid, gap, lines, words };
  }

  function nameOf(layer) {
    const [mean, edited] = [html("span"), html("span", { class: "lp-edited" }, "edited")];
    return { name: html("span", { class: "lp-name" }, html("strong", {}, `layer ${layer}`), mean, edited), mean, edited };
  }

  const after = () => app.result.after ?? app.text.before;
  const before = () => app.text.before;

  // Positions of a row as they are drawn: the model's, and on the way of a drag where they will be.
  function places(entry) {
    const own = after().positions[entry];
    if (!drag || !drag.entries.includes(entry)) return own;
    const by = drag.by - drag.answered;
    return own.map((at, i) => (i >= drag.token ? at + by : at));
  }

  function scales() {
    if (frozen) return frozen;
    const labels = app.text.labels;
    let needed = 0;
    for (const half of halves) needed += Math.max(1.6 * half, 7) + 3;
    const room = Math.max(seenAt.width - seenAt.names, 200);
    const width = Math.max(room, Math.min(needed, 60_000));
    const right = Math.max(PAD, halves[labels.length - 1] + 6);
    const spans = rows.map(({ entry }) => {
      const all = [after().positions[entry], before().positions[entry]];
      let [low, high] = [0, 1e-9];
      for (const of of all)
        for (const at of of) {
          if (at < low) low = at;
          if (at > high) high = at;
        }
      return { low, high };
    });
    const most = Math.max(...spans.map(({ low, high }) => high - low));
    return spans.map(({ low, high }) => {
      const perUnit = (width - PAD - right) / (app.state.scale === "one" ? most : high - low);
      return { low, high, perUnit, width };
    });
  }

  // Draw all rows, or those that a hand on a token moves.
  function redraw(entries = null) {
    if (!app.text || !rows.length) return;
    const every = scales();
    for (const row of rows) if (!entries || entries.includes(row.entry)) drawRow(row, every[row.entry]);
    const whole = seenAt.names + Math.max(...rows.map((row) => row.width));
    scroller.classList.toggle("lp-more", seenAt.left + seenAt.width < whole - 2);
  }

  function drawRow(row, scale) {
    const { labels } = app.text;
    const at = places(row.entry);
    const own = before().positions[row.entry];
    const x = (position) => PAD + (position - scale.low) * scale.perUnit;
    const [from, to] = [seenAt.left - SIGHT, seenAt.left + seenAt.width + SIGHT];
    const seen = (value) => value >= from && value <= to;
    const farthest = drag ? Math.max(scale.width, x(at[at.length - 1]) + PAD) : scale.width;

    // The axis, with its marks in positions.
    update(row.axis, { x2: farthest.toFixed(1) });
    const [low, high] = [Math.max(from, 0), Math.min(to, farthest)].map((px) => scale.low + (px - PAD) / scale.perUnit);
    const every = marks(Math.max(low, scale.low), high, scale.perUnit, 64);
    update(row.lines.grid, { d: every.map((mark) => `M${x(mark).toFixed(1)} ${AXIS}v5`).join("") });
    fill(row.grid, every, newMark, (node, mark) => update(node, { x: x(mark).toFixed(1), text: String(mark) }));

    // The gap in hand: from the token before it to the token.
    const { token, layer } = app.state.gap;
    const held = layer === row.layer;
    const shown = token > 0 && token < at.length && (held || app.inScope(row.layer));
    const [start, end] = shown ? [x(at[token - 1]).toFixed(1), x(at[token]).toFixed(1)] : [0, 0];
    update(row.gap, { x1: start, x2: end, class: held ? "lp-gap lp-held" : "lp-gap", visibility: shown ? null : "hidden" });

    // Where tokens were before the edits, below the axis; where they are now, above it. A line of each kind is one path:
    // thousands of elements would take longer to draw than the model takes to run.
    const lines = { tick: "", was: "", way: "" };
    const words = [];
    const ends = [-Infinity, -Infinity];
    const looked = app.looked();
    for (let i = 0; i < labels.length; i++) {
      const [was, is] = [x(own[i]), x(at[i])];
      if (seen(was) && Math.abs(was - is) > 1) {
        lines.was += `M${was.toFixed(1)} ${AXIS + 1}v11`;
        if (seen(is)) lines.way += `M${was.toFixed(1)} ${AXIS + 12}L${is.toFixed(1)} ${AXIS}`;
      }
      if (!seen(is)) continue;
      // Labels may lap over each other by a third; those that would by more stand a line higher, where there is room.
      const half = halves[i];
      const level = is - OVERLAP * half >= ends[0] ? 0 : is - OVERLAP * half >= ends[1] ? 1 : 0;
      ends[level] = Math.max(ends[level], is + OVERLAP * half);
      lines.tick += `M${is.toFixed(1)} ${AXIS - 6}v6`;
      const look = `lp-token${held && i === token ? " lp-held" : ""}${i === looked ? " lp-looked" : ""}`;
      words.push({ x: is.toFixed(1), y: AXIS - 12 - 16 * level, class: look, "data-i": i, text: shorts[i] });
    }
    for (const [name, d] of Object.entries(lines)) update(row.lines[name], { d });
    fill(row.words, words, newWord, update);
    row.x = at.map(x);
    row.width = farthest;
    update(row.picture, { width: farthest.toFixed(1) });
    describe(row, at);
  }

  const newMark = () => svg("text", { y: AXIS + 27, class: "lp-mark" });
  const newWord = () => svg("text", { "font-size": TYPE });

  function describe(row, at) {
    const { labels, means } = app.text;
    const token = app.state.gap.token;
    const edited = app.state.edits.some((edit) => (edit.layers ?? app.text.layers).includes(row.layer));
    update(row.mean, { text: `mean ${written(means[row.entry])}` });
    update(row.edited, { hidden: edited ? null : "" });
    update(row.node, { class: row.layer === app.state.gap.layer ? "lp-ruler lp-held" : "lp-ruler" });
    const what = token > 0 && token < labels.length ? `gap before “${labels[token]}”, token ${token}` : "no gap";
    update(row.picture, { "aria-label": `Layer ${row.layer}, ${what}` });
    if (app.still || !(token > 0)) return;
    const gap = at[token] - at[token - 1];
    const was = before().positions[row.entry][token] - before().positions[row.entry][token - 1];
    const change = Math.abs(gap - was) > 1e-4 ? `, ${signed(gap - was)} from ${written(was)}` : "";
    update(row.picture, { "aria-valuenow": gap.toFixed(3), "aria-valuetext": `${written(gap)} positions${change}` });
  }

  // ---- the hand ------------------------------------------------------------------------------------------------------

  function onDown(event, entry) {
    const token = Number(event.target.closest?.(".lp-token")?.dataset.i ?? near(event, rows[entry]));
    if (app.still || event.button !== 0 || token < 0) return;
    app.take(rows[entry].layer, token);
    if (token === 0) return;
    event.preventDefault();
    const picture = rows[entry].picture;
    picture.focus({ preventScroll: true });
    picture.setPointerCapture(event.pointerId);
    frozen = scales();
    drag = { entry, token, from: event.clientX, by: 0, answered: 0, entries: app.scopeEntries(), inHand: true };
  }

  // The token that a hand near it means.
  function near(event, row) {
    const [px, py] = [event.clientX, event.clientY].map((at, i) => at - row.picture.getBoundingClientRect()[i ? "top" : "left"]);
    if (py > AXIS + 6 || !row.x) return -1;
    const apart = row.x.map((at) => Math.abs(at - px));
    const closest = apart.indexOf(Math.min(...apart));
    return apart[closest] <= REACH ? closest : -1;
  }

  const dragging = () => drag !== null && drag.inHand;

  function onMove(event) {
    if (!dragging()) return;
    const by = (event.clientX - drag.from) / frozen[drag.entry].perUnit;
    drag.by = Number(by.toPrecision(4));
    redraw(drag.entries);
    app.pull(drag.token, drag.by, false);
  }

  // The rulers stay as the hand left them until the answer is there.
  function onUp() {
    if (!dragging()) return;
    drag.inHand = false;
    const { token, by } = drag;
    if (by !== 0) app.pull(token, by, true);
    else {
      app.letGo();
      app.request();
    }
  }

  // What part of a drag an answer of the model has in it, and whether it is the last to come.
  function answered(by, last) {
    if (drag && by !== null) drag.answered = by;
    if (last && !dragging()) drag = frozen = null;
  }

  function onKey(event, entry) {
    if (app.still || event.ctrlKey || event.metaKey || event.altKey) return;
    const { token } = app.state.gap;
    const last = app.text.labels.length - 1;
    const forth = app.rightToLeft ? -1 : 1;
    const to = { ArrowRight: token + forth, ArrowLeft: token - forth, Home: 1, End: last }[event.key];
    const step = event.shiftKey ? 1 : 0.1;
    const by = { ArrowUp: step, ArrowDown: -step, "+": 0.1, "-": -0.1, PageUp: 1, PageDown: -1 }[event.key];
    if (to !== undefined) app.take(rows[entry].layer, Math.min(Math.max(to, 1), last));
    else if (by !== undefined && token > 0) app.pull(token, by, true);
    else if (event.key === "Delete" || event.key === "Backspace") app.reset(token);
    else return;
    event.preventDefault();
    show(token);
  }

  // Scroll the gap in hand into sight.
  function show(token) {
    if (!(token >= 0) || !rows.length) return;
    const entry = Math.max(app.text.layers.indexOf(app.state.gap.layer), 0);
    const scale = scales()[entry];
    const at = PAD + (places(entry)[token] - scale.low) * scale.perUnit;
    if (at < seenAt.left + 20 || at > seenAt.left + seenAt.width - 120) scroller.scrollLeft = at - seenAt.width / 2;
  }

  // Called by the ResizeObserver, when the page is laid out.
  function measure() {
    const [width, names] = [scroller.clientWidth, rows[0]?.name.offsetWidth ?? 0];
    if (width === seenAt.width && names === seenAt.names) return;
    Object.assign(seenAt, { width, names });
    redraw();
  }
  new ResizeObserver(measure).observe(scroller);
  return { node: scroller, build, redraw, answered, dragging };
}
