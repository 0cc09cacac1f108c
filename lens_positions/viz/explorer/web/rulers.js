// Tokens on the ruler of each layer, to scale. A token is dragged, or its gap made longer with the arrow keys; tokens
// after it move along. Only what is in sight is drawn, so that thousands of tokens stay light.

import { html, marks, short, signed, svg, widthOf, written } from "./dom.js";

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
  let drag = null;
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
      const name = html("span", { class: "lp-name" });
      rows.push({ layer, entry, picture, name, node: html("div", { class: "lp-ruler" }, name, picture) });
    });
    scroller.replaceChildren(...rows.map((row) => row.node));
    seenAt.width = scroller.clientWidth;
    seenAt.names = rows[0].name.offsetWidth;
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

  function redraw() {
    if (!app.text || !rows.length) return;
    const every = scales();
    rows.forEach((row) => drawRow(row, every[row.entry]));
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
    const parts = [];

    // The axis, with its marks in positions.
    parts.push(svg("line", { x1: 0, x2: farthest, y1: AXIS, y2: AXIS, class: "lp-axis" }));
    const [low, high] = [Math.max(from, 0), Math.min(to, farthest)].map((px) => scale.low + (px - PAD) / scale.perUnit);
    for (const mark of marks(Math.max(low, scale.low), high, scale.perUnit, 64)) {
      parts.push(svg("line", { x1: x(mark), x2: x(mark), y1: AXIS, y2: AXIS + 5, class: "lp-axis" }));
      parts.push(svg("text", { x: x(mark), y: AXIS + 27, class: "lp-mark" }, String(mark)));
    }

    // The gap in hand: from the token before it to the token.
    const { token, layer } = app.state.gap;
    if (token > 0 && token < at.length && (app.inScope(row.layer) || layer === row.layer)) {
      const [start, end] = [x(at[token - 1]), x(at[token])];
      const held = layer === row.layer ? "lp-gap lp-held" : "lp-gap";
      parts.push(svg("line", { x1: start, x2: end, y1: AXIS, y2: AXIS, class: held }));
    }

    // Where tokens were before the edits, below the axis; where they are now, above it. A line of each kind is one path:
    // thousands of elements would take longer to draw than the model takes to run.
    const lines = { tick: "", was: "", way: "" };
    const words = [];
    const ends = [-Infinity, -Infinity];
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
      const look = `lp-token${i === token && layer === row.layer ? " lp-held" : ""}${i === app.looked() ? " lp-looked" : ""}`;
      words.push(svg("text", { x: is, y: AXIS - 12 - 16 * level, "font-size": TYPE, class: look, "data-i": i }, shorts[i]));
    }
    for (const [name, d] of Object.entries(lines)) if (d) parts.push(svg("path", { d, class: `lp-${name}` }));
    parts.push(...words);
    row.x = at.map(x);
    row.width = farthest;
    row.picture.setAttribute("width", farthest);
    row.picture.replaceChildren(...parts);
    describe(row, at);
  }

  function describe(row, at) {
    const { labels, means } = app.text;
    const token = app.state.gap.token;
    const edited = app.state.edits.some((edit) => (edit.layers ?? app.text.layers).includes(row.layer));
    row.name.replaceChildren(
      html("strong", {}, `layer ${row.layer}`),
      html("span", {}, `mean ${written(means[row.entry])}`),
      ...(edited ? [html("span", { class: "lp-edited" }, "edited")] : []),
    );
    row.node.classList.toggle("lp-held", row.layer === app.state.gap.layer);
    const what = token > 0 && token < labels.length ? `gap before “${labels[token]}”, token ${token}` : "no gap";
    row.picture.setAttribute("aria-label", `Layer ${row.layer}, ${what}`);
    if (app.still || !(token > 0)) return;
    const gap = at[token] - at[token - 1];
    const was = before().positions[row.entry][token] - before().positions[row.entry][token - 1];
    row.picture.setAttribute("aria-valuenow", gap.toFixed(3));
    const change = Math.abs(gap - was) > 1e-4 ? `, ${signed(gap - was)} from ${written(was)}` : "";
    row.picture.setAttribute("aria-valuetext", `${written(gap)} positions${change}`);
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
    drag = { entry, token, from: event.clientX, by: 0, answered: 0, entries: app.scopeEntries() };
  }

  // The token that a hand near it means.
  function near(event, row) {
    const [px, py] = [event.clientX, event.clientY].map((at, i) => at - row.picture.getBoundingClientRect()[i ? "top" : "left"]);
    if (py > AXIS + 6 || !row.x) return -1;
    const apart = row.x.map((at) => Math.abs(at - px));
    const closest = apart.indexOf(Math.min(...apart));
    return apart[closest] <= REACH ? closest : -1;
  }

  function onMove(event) {
    if (!drag) return;
    const by = (event.clientX - drag.from) / frozen[drag.entry].perUnit;
    drag.by = Number(by.toPrecision(4));
    redraw();
    app.pull(drag.token, drag.by, false);
  }

  function onUp() {
    if (!drag) return;
    const { token, by } = drag;
    drag = null;
    frozen = null;
    if (by !== 0) app.pull(token, by, true);
    else app.letGo();
    redraw();
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

  function measure() {
    seenAt.width = scroller.clientWidth;
    seenAt.names = rows[0]?.name.offsetWidth ?? 0;
    redraw();
  }
  new ResizeObserver(measure).observe(scroller);
  return {
    node: scroller,
    build,
    redraw,
    // What part of a drag an answer of the model has in it.
    answered: (by) => drag && (drag.answered = by),
    dragging: () => drag !== null,
  };
}
