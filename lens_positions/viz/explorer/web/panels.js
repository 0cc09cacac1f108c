// Beside the rulers: the text with its losses, the next token, attention, heads that changed, and edits in words.

import { circuits, html, marks, menu, percent, short, signed, svg, unpack, widthOf, written } from "./dom.js";

const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]/;
const SHOWN_ARC = 0.01; // attention below this is not drawn
const HIGHEST = 92; // pixels
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
    tokens.forEach(({ node, bars, slope }, i) => {
      const [was, is] = [before.losses[i], after.losses[i]];
      bars[0].style.height = `${was === null ? 0 : (100 * was) / most}%`;
      bars[1].style.height = `${is === null ? 0 : (100 * is) / most}%`;
      const steep = slopes ? slopes[i] / steepest : 0;
      slope.textContent = Math.abs(steep) < SHOWN_SLOPE ? "" : steep > 0 ? "▲" : "▼";
      slope.className = `lp-slope ${steep > 0 ? "lp-hurts" : "lp-helps"}`;
      slope.style.opacity = Math.max(0.45, Math.abs(steep));
      const said = was === null ? "no loss, it is the first" : `loss ${written(was)} nats, ${signed(is - was, 3)} by the edits`;
      const effect = slopes && i > 0 ? `; a gap longer by 1 before it changes the mean loss by ${signed(slopes[i], 3)}` : "";
      node.title = `“${app.text.labels[i]}”, token ${i}: ${said}${effect}`;
      node.setAttribute("aria-label", node.title);
      node.setAttribute("aria-pressed", i === app.looked());
      node.tabIndex = i === app.looked() ? 0 : -1;
    });
    const change = before.loss === null ? "" : ` Mean loss ${before.loss.toFixed(3)}`;
    const now = app.result.after && before.loss !== null ? ` → ${after.loss.toFixed(3)} (${signed(after.loss - before.loss, 4)})` : "";
    tip.textContent =
      `Bars: loss of each token before (outline) and after (filled).${change}${now}${change ? " nats per token." : ""} ` +
      `▼ a longer gap before it would lower the mean loss, ▲ raise it (slopes without edits, ${app.scopeWords()}).`;
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
  const node = html("section", { class: "lp-panel lp-next" });
  function draw() {
    const { candidates, divergence } = app.result.next;
    const token = app.looked();
    const most = Math.max(...candidates.flatMap(({ before, after }) => [before, after]).map(Math.exp), 1e-9);
    const own = app.text.ids[token + 1];
    const rows = candidates.map(({ id, label, before, after }) =>
      html(
        "tr",
        { "data-id": id, "data-after": after },
        html("th", { scope: "row" }, html("bdi", {}, short(label)), id === own ? html("small", {}, " in the text") : ""),
        html(
          "td",
          { class: "lp-bars-cell", "aria-hidden": "true" },
          html("i", { class: "lp-bar-was", style: `width:${(100 * Math.exp(before)) / most}%` }),
          html("i", { class: "lp-bar-is", style: `width:${(100 * Math.exp(after)) / most}%` }),
        ),
        html("td", {}, percent(before)),
        html("td", {}, percent(after)),
        html("td", { class: "lp-change" }, Math.abs(after - before) < 5e-4 ? "0" : signed(after - before, 3)),
      ),
    );
    const head = ["token", "", "before", "after", "nats"].map((name, i) => html("th", { scope: "col", class: i ? null : "lp-first" }, name));
    node.replaceChildren(
      html("h2", {}, "After ", html("bdi", {}, `“${short(app.text.labels[token])}”`), ` comes`),
      html("table", {}, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...rows)),
      html(
        "p",
        { class: "lp-note" },
        app.result.after
          ? `The edits move this distribution by ${divergence.toPrecision(3)} nats (KL from before to after).`
          : "No edits yet: drag a token on a ruler, or take one and press the up arrow.",
      ),
    );
  }
  return { node, draw };
}

// ---- edits ----------------------------------------------------------------------------------------------------------

export function edits(app) {
  const node = html("section", { class: "lp-panel" });
  function draw() {
    const list = app.result.edits.map((words, i) =>
      html(
        "li",
        {},
        html("span", { dir: "auto" }, words),
        app.still
          ? null
          : html("button", { type: "button", class: "lp-small", "aria-label": `Remove: ${words}`, click: () => app.remove(i) }, "Remove"),
      ),
    );
    const python = html("pre", { tabindex: "0", "aria-label": "The same in Python" }, html("code", {}, app.result.python));
    node.replaceChildren(
      html("h2", {}, "Edits"),
      list.length ? html("ol", { class: "lp-edits" }, ...list) : html("p", { class: "lp-note" }, "None: the model is as it is."),
      html("details", { open: app.still, class: "lp-python" }, html("summary", {}, "The same in Python"), python),
    );
  }
  return { node, draw };
}

// ---- heads ----------------------------------------------------------------------------------------------------------

export function heads(app) {
  const node = html("section", { class: "lp-panel" });
  function draw() {
    const found = app.result.heads ?? [];
    const most = Math.max(...found.map((head) => head.by), 1e-9);
    const list = found.map(({ layer, head, by }) =>
      html(
        "li",
        {},
        html(
          "button",
          {
            type: "button",
            class: "lp-head",
            disabled: app.still,
            "aria-pressed": layer === app.state.layer && head === app.state.head,
            click: () => app.look({ layer, head }),
          },
          html("span", {}, `layer ${layer}, head ${head}`),
          html("i", { class: "lp-bar-is", style: `width:${(40 * by) / most}%`, "aria-hidden": "true" }),
          html("span", {}, `${(100 * by).toFixed(1)}%`),
        ),
      ),
    );
    const token = app.text.labels[app.looked()];
    node.replaceChildren(
      html("h2", {}, "Heads that changed most"),
      list.length ? html("ol", { class: "lp-heads-list" }, ...list) : html("p", { class: "lp-note" }, "None."),
      html("p", { class: "lp-note" }, `How much of the attention of “${short(token)}” went elsewhere (total variation).`),
    );
  }
  return { node, draw };
}

// ---- attention ------------------------------------------------------------------------------------------------------

export function attention(app) {
  const scroller = html("div", { class: "lp-wide", tabindex: "0", role: "group", scroll: () => requestAnimationFrame(arcs) });
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
  let drawn = "";

  function draw() {
    const { attention: seen } = app.result;
    node.hidden = !seen;
    if (!seen) return;
    const layers = app.text.layers.map((layer) => [layer, `layer ${layer}`]);
    const every = Array.from({ length: app.text.heads }, (_, head) => [head, `head ${head}`]);
    const menus = [
      menu("Layer", layers, app.state.layer, (layer) => app.look({ layer: Number(layer) })),
      menu("Head", every, app.state.head, (head) => app.look({ head: Number(head) })),
    ];
    if (controls.dataset.key !== app.text.key) controls.replaceChildren(...menus);
    controls.dataset.key = app.text.key;
    controls.querySelectorAll("select").forEach((select, i) => {
      select.value = i ? app.state.head : app.state.layer;
      select.disabled = app.still;
    });
    whole.open = app.state.pattern;
    whole.hidden = !seen.whole || app.still;
    arcs();
    describe(seen);
    if (app.state.pattern && seen.before.pattern) app.withCircuits(() => patterns(seen));
  }

  function arcs() {
    const { attention: seen } = app.result;
    if (!seen) return;
    const { labels } = app.text;
    const n = labels.length;
    const token = app.looked();
    const size = 13;
    const width = Math.max(scroller.clientWidth, Math.min(labels.reduce((sum, label) => sum + Math.max(widthOf(label, size) * 0.7, 6) + 3, 44), 60_000));
    const [from, to] = [scroller.scrollLeft - 200, scroller.scrollLeft + scroller.clientWidth + 200];
    const now = seen.after ?? seen.before;
    const every = [...seen.before.positions, ...now.positions];
    const low = Math.min(...every);
    const right = Math.max(22, widthOf(labels[n - 1], size) / 2 + 6);
    const perUnit = (width - 22 - right) / (Math.max(...every) - low || 1);
    const x = (at) => 22 + (at - low) * perUnit;
    let reach = 24; // as high as the farthest arc needs
    for (const { row, positions } of [seen.before, now])
      for (let key = 0; key <= token; key++)
        if (row[key] >= SHOWN_ARC) reach = Math.max(reach, Math.min(HIGHEST, (perUnit * Math.abs(positions[token] - positions[key])) / 2));
    const [top, bottom] = [reach + 18, reach + 90];
    const picture = svg("svg", { width, height: bottom + reach + 40, role: "img", "aria-label": `Attention of token ${token} before and after` });
    for (const [side, y, values, name] of [[-1, top, seen.before, "before"], [1, bottom, now, "after"]]) {
      const at = values.positions;
      picture.append(svg("line", { x1: 0, x2: width, y1: y, y2: y, class: "lp-axis" }));
      for (let key = 0; key <= token; key++) {
        const weight = values.row[key];
        if (weight < SHOWN_ARC) continue;
        const [a, b] = [x(at[token]), x(at[key])];
        const height = Math.max(Math.min(Math.abs(a - b) / 2, reach), 7);
        const d =
          Math.abs(a - b) < 1
            ? `M ${a - 4} ${y} a 4 7 0 1 ${side < 0 ? 1 : 0} 8 0`
            : `M ${a} ${y} A ${Math.abs(a - b) / 2} ${height} 0 0 ${a > b === side < 0 ? 0 : 1} ${b} ${y}`;
        picture.append(svg("path", { d, class: `lp-arc lp-arc-${name}`, "stroke-width": 0.8 + 6 * weight, opacity: 0.35 + 0.65 * weight, "data-key": key }));
      }
      let end = -Infinity;
      for (let i = 0; i < n; i++) {
        const px = x(at[i]);
        if (px < from || px > to) continue;
        if (side < 0 && x(now.positions[i]) !== px) picture.append(svg("line", { x1: px, x2: x(now.positions[i]), y1: top + 24, y2: bottom - 24, class: "lp-was lp-way" }));
        picture.append(svg("line", { x1: px, x2: px, y1: y - 4, y2: y + 4, class: "lp-axis" }));
        const half = widthOf(labels[i], size) / 2;
        if (px - half < end && i !== token) continue;
        end = px + half;
        const look = `lp-key${i === token ? " lp-looked" : i > token ? " lp-unseen" : ""}`;
        picture.append(svg("text", { x: px, y: side < 0 ? y + 18 : y - 9, "font-size": size, class: look, click: () => app.still || app.look({ token: i }) }, short(labels[i])));
      }
      const heading = { x: 4 + Math.max(scroller.scrollLeft, 0), y: side < 0 ? 14 : bottom + reach + 14, class: "lp-mark lp-left" };
      picture.append(svg("text", heading, name));
    }
    for (const mark of marks(Math.max(low, low + (from - 22) / perUnit), low + (Math.min(to, width) - 22) / perUnit, perUnit, 70))
      picture.append(svg("text", { x: x(mark), y: bottom + reach + 32, class: "lp-mark" }, String(mark)));
    scroller.replaceChildren(picture);
    scroller.setAttribute("aria-label", `Attention of token ${token}, layer ${app.state.layer}, head ${app.state.head}`);
    scroller.classList.toggle("lp-more", scroller.scrollLeft + scroller.clientWidth < scroller.scrollWidth - 2);
    const watched = x(now.positions[token]);
    const key = `${app.text.key} ${token} ${scroller.clientWidth}`;
    if (key === drawn) return;
    drawn = key;
    if (watched > scroller.clientWidth - 20) scroller.scrollLeft = watched - scroller.clientWidth + 60;
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
    said.textContent = `“${short(labels[app.looked()])}” attends ${each.join(", ")}. Arcs below 1% are left out.`;
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

  new ResizeObserver(() => app.result && draw()).observe(scroller);
  return { node, draw };
}
