// Beside the rulers: the text with its losses, the next token, attention, heads that changed, and edits in words.

import { circuits, fill, html, marks, menu, percent, short, signed, svg, unpack, update, widthOf, written } from "./dom.js";

const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;
const SHOWN_ARC = 0.01; // attention below this is not drawn
const HIGHEST = 92; // pixels
const KEY = 13; // pixels: the type of tokens under arcs
const SHOWN_SLOPE = 0.25; // of the steepest: slopes below this have no mark

// ---- the text -------------------------------------------------------------------------------------------------------

// Each token with its loss before and after, and whether a longer gap before it would help or hurt.
export function strip(app) {
  const list = html("div", {
    class: "lp-strip",
    role: "group",
    "aria-label": "Tokens. Arrow keys choose the one whose prediction is shown.",
    keydown: onKey,
  });
  const tip = html("p", { class: "lp-note", "aria-live": "polite" });
  let tokens = [];

  function build() {
    list.dir = RIGHT_TO_LEFT.test(/\p{L}/u.exec(app.text.text)?.[0] ?? "") ? "rtl" : "ltr";
    tokens = app.text.labels.map((label, i) => {
      const bars = [html("i", { class: "lp-bar-was" }), html("i", { class: "lp-bar-is" })];
      const slope = html("span", { class: "lp-slope", "aria-hidden": "true" });
      const node = html(
        "button",
        { type: "button", class: "lp-chip", tabindex: "-1", disabled: app.still, click: () => app.look({ token: i }) },
        html("span", { class: "lp-bars", "aria-hidden": "true" }, ...bars),
        html("bdi", {}, short(label)),
        slope,
      );
      return { node, bars, slope };
    });
    list.replaceChildren(...tokens.map((token) => token.node));
  }

  function draw() {
    const { before } = app.text;
    const after = app.result.after ?? before;
    const most = Math.max(1, ...before.losses.map((loss) => loss ?? 0), ...after.losses.map((loss) => loss ?? 0));
    const slopes = app.slopes ? scoped(app) : null;
    const steepest = slopes ? Math.max(1e-9, ...slopes.map(Math.abs)) : 1;
    const looked = app.looked();
    const high = (loss) => `height:${loss === null ? 0 : ((100 * loss) / most).toFixed(1)}%`;
    tokens.forEach(({ node, bars, slope }, i) => {
      const [was, is] = [before.losses[i], after.losses[i]];
      update(bars[0], { style: high(was) });
      update(bars[1], { style: high(is) });
      const steep = slopes ? slopes[i] / steepest : 0;
      const sign = Math.abs(steep) < SHOWN_SLOPE ? "" : steep > 0 ? "▲" : "▼";
      update(slope, { text: sign, class: `lp-slope ${steep > 0 ? "lp-hurts" : "lp-helps"}`, style: `opacity:${Math.max(0.45, Math.abs(steep)).toFixed(2)}` });
      const said = was === null ? "no loss, it is the first" : `loss ${written(was)} nats, ${signed(is - was, 3)} by the edits`;
      const effect = slopes && i > 0 ? `; a gap longer by 1 before it changes the mean loss by ${signed(slopes[i], 3)}` : "";
      const title = `“${app.text.labels[i]}”, token ${i}: ${said}${effect}`;
      update(node, { title, "aria-label": title, "aria-pressed": String(i === looked), tabindex: i === looked ? "0" : "-1" });
    });
    const change = before.loss === null ? "" : ` Mean loss ${before.loss.toFixed(3)}`;
    const now = app.result.after && before.loss !== null ? ` → ${after.loss.toFixed(3)} (${signed(after.loss - before.loss, 4)})` : "";
    const text =
      `Bars: loss of each token before (outline) and after (filled).${change}${now}${change ? " nats per token." : ""} ` +
      `▼ a longer gap before it would lower the mean loss, ▲ raise it (slopes without edits, ${app.scopeWords()}).`;
    update(tip, { text });
  }

  function onKey(event) {
    const forth = app.rightToLeft ? -1 : 1;
    const here = app.state.token ?? app.looked();
    const last = tokens.length - 1;
    const to = { ArrowRight: here + forth, ArrowLeft: here - forth, Home: 0, End: last }[event.key];
    if (to === undefined || app.still) return;
    event.preventDefault();
    const token = Math.min(Math.max(to, 0), last);
    app.look({ token });
    tokens[token].node.focus();
  }

  return { node: html("div", {}, list, tip), build, draw };
}

// Slopes of the layers that an edit would reach, in sum.
function scoped(app) {
  const entries = app.scopeEntries();
  return app.text.labels.map((_, i) => entries.reduce((sum, entry) => sum + app.slopes[entry][i], 0));
}

// ---- the next token -------------------------------------------------------------------------------------------------

export function prediction(app) {
  const heading = html("bdi");
  const said = html("p", { class: "lp-note" });
  const body = html("tbody");
  const head = ["token", "", "before", "after", "nats"].map((name, i) => html("th", { scope: "col", class: i ? null : "lp-first" }, name));
  const table = html("table", {}, html("thead", {}, html("tr", {}, ...head)), body);
  const node = html("section", { class: "lp-panel lp-next" }, html("h2", {}, "After ", heading, " comes"), table, said);

  function make() {
    const [label, own, was, is] = [html("bdi"), html("small", {}, " in the text"), html("i", { class: "lp-bar-was" }), html("i", { class: "lp-bar-is" })];
    const numbers = [html("td"), html("td"), html("td", { class: "lp-change" })];
    const bars = html("td", { class: "lp-bars-cell", "aria-hidden": "true" }, was, is);
    const row = html("tr", {}, html("th", { scope: "row" }, label, own), bars, ...numbers);
    return Object.assign(row, { parts: { label, own, was, is, numbers } });
  }

  function draw() {
    const { candidates, divergence } = app.result.next;
    const token = app.looked();
    const most = Math.max(...candidates.flatMap(({ before, after }) => [before, after]).map(Math.exp), 1e-9);
    const wide = (log) => `width:${((100 * Math.exp(log)) / most).toFixed(1)}%`;
    fill(body, candidates, make, (row, { id, label, before, after }) => {
      const { parts } = row;
      update(row, { "data-id": id, "data-after": after });
      update(parts.label, { text: short(label) });
      update(parts.own, { hidden: id === app.text.ids[token + 1] ? null : "" });
      update(parts.was, { style: wide(before) });
      update(parts.is, { style: wide(after) });
      const texts = [percent(before), percent(after), Math.abs(after - before) < 5e-4 ? "0" : signed(after - before, 3)];
      texts.forEach((text, i) => update(parts.numbers[i], { text }));
    });
    update(heading, { text: `“${short(app.text.labels[token])}”` });
    const text = app.result.after
      ? `The edits move this distribution by ${divergence.toPrecision(3)} nats (KL from before to after).`
      : "No edits yet: drag a token on a ruler, or take one and press the up arrow.";
    update(said, { text });
  }
  return { node, draw };
}

// ---- edits ----------------------------------------------------------------------------------------------------------

export function edits(app) {
  const none = html("p", { class: "lp-note" }, "None: the model is as it is.");
  const list = html("ol", { class: "lp-edits" });
  const code = html("code");
  const python = html("pre", { tabindex: "0", "aria-label": "The same in Python" }, code);
  const whole = html("details", { open: app.still, class: "lp-python" }, html("summary", {}, "The same in Python"), python);
  const node = html("section", { class: "lp-panel" }, html("h2", {}, "Edits"), none, list, whole);

  function make() {
    const words = html("span", { dir: "auto" });
    const remove = html("button", { type: "button", class: "lp-small", click: () => app.remove([...list.children].indexOf(row)) }, "Remove");
    const row = html("li", {}, words, app.still ? null : remove);
    return Object.assign(row, { parts: { words, remove } });
  }

  function draw() {
    const every = app.result.edits;
    fill(list, every, make, ({ parts }, text) => {
      update(parts.words, { text });
      update(parts.remove, { "aria-label": `Remove: ${text}` });
    });
    update(none, { hidden: every.length ? "" : null });
    update(list, { hidden: every.length ? null : "" });
    update(code, { text: app.result.python });
  }
  return { node, draw };
}

// ---- heads ----------------------------------------------------------------------------------------------------------

export function heads(app) {
  const none = html("p", { class: "lp-note" }, "None.");
  const list = html("ol", { class: "lp-heads-list" });
  const said = html("p", { class: "lp-note" });
  const node = html("section", { class: "lp-panel" }, html("h2", {}, "Heads that changed most"), none, list, said);

  function make() {
    const [name, bar, share] = [html("span"), html("i", { class: "lp-bar-is", "aria-hidden": "true" }), html("span")];
    const button = html("button", { type: "button", class: "lp-head", disabled: app.still, click: () => app.look(row.shows) }, name, bar, share);
    const row = html("li", {}, button);
    return Object.assign(row, { parts: { button, name, bar, share } });
  }

  function draw() {
    const found = app.result.heads ?? [];
    const most = Math.max(...found.map((head) => head.by), 1e-9);
    fill(list, found, make, (row, { layer, head, by }) => {
      const { button, name, bar, share } = row.parts;
      row.shows = { layer, head };
      update(button, { "aria-pressed": String(layer === app.state.layer && head === app.state.head) });
      update(name, { text: `layer ${layer}, head ${head}` });
      update(bar, { style: `width:${((40 * by) / most).toFixed(1)}%` });
      update(share, { text: `${(100 * by).toFixed(1)}%` });
    });
    update(none, { hidden: found.length ? "" : null });
    update(list, { hidden: found.length ? null : "" });
    update(said, { text: `How much of the attention of “${short(app.text.labels[app.looked()])}” went elsewhere (total variation).` });
  }
  return { node, draw };
}

// ---- attention ------------------------------------------------------------------------------------------------------

export function attention(app) {
  const scroller = html("div", { class: "lp-wide", tabindex: "0", role: "group", scroll: () => requestAnimationFrame(scrolled) });
  const seenAt = { left: 0, width: 0 }; // read when they change: to read them in a drawing lays the page out
  const controls = html("div", { class: "lp-row-of" });
  const papers = [html("div", { class: "lp-paper" }), html("div", { class: "lp-paper" })];
  const whole = html(
    "details",
    { class: "lp-whole", toggle: () => whole.open !== app.state.pattern && app.look({ pattern: whole.open }) },
    html("summary", {}, "The whole pattern of this head, before and after (circuitsvis)"),
    html("div", { class: "lp-papers" }, ...papers.map((paper, i) => html("figure", {}, html("figcaption", {}, i ? "after" : "before"), paper))),
  );
  const said = html("p", { class: "lp-note" });
  const node = html("section", { class: "lp-panel lp-seen" }, html("h2", {}, "Attention"), controls, scroller, said, whole);

  // One picture, whose parts are written anew when they change.
  const picture = svg("svg", { role: "img" });
  const sides = [sideOf("before"), sideOf("after")];
  const ways = svg("path", { class: "lp-was lp-way" });
  const grid = svg("g");
  picture.append(ways, ...sides.map((side) => side.group), grid);
  scroller.append(picture);
  let watchedAt = "";

  function sideOf(name) {
    const [axis, ticks] = [svg("line", { x1: 0, class: "lp-axis" }), svg("path", { class: "lp-axis" })];
    const [arcs, words] = [svg("g"), svg("g")];
    const heading = svg("text", { "font-size": KEY, class: "lp-mark lp-left" }, name);
    return { group: svg("g", {}, axis, ticks, arcs, words, heading), axis, ticks, arcs, words, heading };
  }

  function draw() {
    const { attention: seen } = app.result;
    node.hidden = !seen;
    if (!seen) return;
    const layers = app.text.layers.map((layer) => [layer, `layer ${layer}`]);
    const every = Array.from({ length: app.text.heads }, (_, head) => [head, `head ${head}`]);
    if (controls.dataset.key !== app.text.key)
      controls.replaceChildren(
        menu("Layer", layers, app.state.layer, (layer) => app.look({ layer: Number(layer) })),
        menu("Head", every, app.state.head, (head) => app.look({ head: Number(head) })),
      );
    controls.dataset.key = app.text.key;
    controls.querySelectorAll("select").forEach((select, i) => {
      const value = String(i ? app.state.head : app.state.layer);
      if (select.value !== value) select.value = value;
      select.disabled = app.still;
    });
    if (whole.open !== app.state.pattern) whole.open = app.state.pattern;
    whole.hidden = !seen.whole || app.still;
    arcs();
    describe(seen);
    if (app.state.pattern && seen.before.pattern) app.withCircuits(() => patterns(seen));
  }

  // Positions as pixels, and how high the arcs are: as the farthest needs.
  function scaleOf(seen, now) {
    const { labels } = app.text;
    const token = app.looked();
    const needed = labels.reduce((sum, label) => sum + Math.max(widthOf(label, KEY) * 0.7, 6) + 3, 44);
    const width = Math.max(seenAt.width, Math.min(needed, 60_000));
    const every = [...seen.before.positions, ...now.positions];
    const low = Math.min(...every);
    const right = Math.max(22, widthOf(labels[labels.length - 1], KEY) / 2 + 6);
    const perUnit = (width - 22 - right) / (Math.max(...every) - low || 1);
    let reach = 24;
    for (const { row, positions } of [seen.before, now])
      for (let key = 0; key <= token; key++)
        if (row[key] >= SHOWN_ARC) reach = Math.max(reach, Math.min(HIGHEST, (perUnit * Math.abs(positions[token] - positions[key])) / 2));
    return { low, perUnit, width, reach: Math.round(reach), x: (at) => 22 + (at - low) * perUnit };
  }

  function arcs() {
    const { attention: seen } = app.result;
    if (!seen) return;
    const token = app.looked();
    const now = seen.after ?? seen.before;
    const scale = scaleOf(seen, now);
    const { low, perUnit, width, reach, x } = scale;
    const [top, bottom] = [reach + 18, reach + 90];
    const sight = [seenAt.left - 200, seenAt.left + seenAt.width + 200];
    update(picture, { width: width.toFixed(1), height: bottom + reach + 40, "aria-label": `Attention of token ${token} before and after` });
    drawSide(sides[0], seen.before, -1, top, scale, sight);
    drawSide(sides[1], now, 1, bottom, scale, sight);
    update(sides[0].heading, { x: 4 + seenAt.left, y: 14 });
    update(sides[1].heading, { x: 4 + seenAt.left, y: bottom + reach + 14 });

    // From where a token was to where it is.
    let way = "";
    seen.before.positions.forEach((was, i) => {
      const [from, to] = [x(was), x(now.positions[i])];
      if (from >= sight[0] && from <= sight[1] && from !== to) way += `M${from.toFixed(1)} ${top + 24}L${to.toFixed(1)} ${bottom - 24}`;
    });
    update(ways, { d: way });
    const every = marks(Math.max(low, low + (sight[0] - 22) / perUnit), low + (Math.min(sight[1], width) - 22) / perUnit, perUnit, 70);
    fill(grid, every, () => svg("text", { class: "lp-mark" }), (node, mark) => update(node, { x: x(mark).toFixed(1), y: bottom + reach + 32, text: String(mark) }));
    update(scroller, { "aria-label": `Attention of token ${token}, layer ${app.state.layer}, head ${app.state.head}` });
    follow(x(now.positions[token]), token, width);
  }

  // One ruler with its arcs: upwards before the edits, downwards after them.
  function drawSide(side, { row, positions }, down, y, { width, reach, x }, [from, to]) {
    const { labels } = app.text;
    const token = app.looked();
    update(side.axis, { x2: width.toFixed(1), y1: y, y2: y });
    const [shown, words] = [[], []];
    for (let key = 0; key <= token; key++) {
      const weight = row[key];
      if (weight < SHOWN_ARC) continue;
      const [a, b] = [x(positions[token]), x(positions[key])].map((at) => Number(at.toFixed(1)));
      const half = Math.abs(a - b) / 2;
      const height = Math.max(Math.min(half, reach), 7).toFixed(1);
      const d =
        half < 0.5
          ? `M ${a - 4} ${y} a 4 7 0 1 ${down < 0 ? 1 : 0} 8 0`
          : `M ${a} ${y} A ${half.toFixed(1)} ${height} 0 0 ${a > b === down < 0 ? 0 : 1} ${b} ${y}`;
      shown.push({ d, "stroke-width": (0.8 + 6 * weight).toFixed(2), opacity: (0.35 + 0.65 * weight).toFixed(2), "data-key": key });
    }
    let [end, ticks] = [-Infinity, ""];
    for (let i = 0; i < labels.length; i++) {
      const px = x(positions[i]);
      if (px < from || px > to) continue;
      ticks += `M${px.toFixed(1)} ${y - 4}v8`;
      const half = widthOf(labels[i], KEY) / 2;
      if (px - half < end && i !== token) continue;
      end = px + half;
      const look = `lp-key${i === token ? " lp-looked" : i > token ? " lp-unseen" : ""}`;
      words.push({ x: px.toFixed(1), y: down < 0 ? y + 18 : y - 9, class: look, "data-i": i, text: short(labels[i]) });
    }
    update(side.ticks, { d: ticks });
    const name = down < 0 ? "before" : "after";
    fill(side.arcs, shown, () => svg("path", { class: `lp-arc lp-arc-${name}` }), update);
    fill(side.words, words, newKey, update);
  }

  const newKey = () => svg("text", { "font-size": KEY, click: (event) => app.still || app.look({ token: Number(event.target.dataset.i) }) });

  // Scroll to the chosen token when there is another, and say whether there is more to the right.
  function follow(at, token, width) {
    const key = `${app.text.key} ${token} ${seenAt.width}`;
    if (key !== watchedAt && at > seenAt.width - 20) scroller.scrollLeft = seenAt.left = Math.min(at - seenAt.width + 60, width - seenAt.width);
    watchedAt = key;
    scroller.classList.toggle("lp-more", seenAt.left + seenAt.width < width - 2);
  }

  function scrolled() {
    seenAt.left = scroller.scrollLeft;
    if (app.result) arcs();
  }

  function describe(seen) {
    const { labels } = app.text;
    const now = seen.after ?? seen.before;
    const most = now.row
      .map((weight, key) => [weight, key])
      .sort((a, b) => b[0] - a[0])
      .slice(0, 3);
    const each = most.map(([weight, key]) => {
      const was = seen.after ? ` (before ${(100 * seen.before.row[key]).toFixed(1)}%)` : "";
      return `${(100 * weight).toFixed(1)}% to “${short(labels[key])}”${was}`;
    });
    update(said, { text: `“${short(labels[app.looked()])}” attends ${each.join(", ")}. Arcs below 1% are left out.` });
  }

  function patterns(seen) {
    const { labels } = app.text;
    [seen.before, seen.after ?? seen.before].forEach((values, i) => {
      if (!values.pattern) return;
      circuits(papers[i], "AttentionPattern", {
        tokens: labels,
        attention: unpack(values.pattern, labels.length),
        showAxisLabels: false,
        minValue: 0,
        maxValue: 1,
      });
    });
  }

  // Its height changes with the arcs, and is of no matter.
  function measure() {
    if (seenAt.width === scroller.clientWidth) return;
    seenAt.width = scroller.clientWidth;
    scrolled();
  }
  new ResizeObserver(measure).observe(scroller);
  return { node, draw };
}
