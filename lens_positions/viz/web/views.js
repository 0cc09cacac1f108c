// The interactive views of a page: characters at their positions, tokens tinted by increment, attention beside
// increments. Each figure of class lp-view names its kind and carries its data as JSON; text only ever becomes text
// nodes, so nothing in a model's text can run.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const TYPE = 16; // pixels
  const LONGEST = 20; // characters of a unit as drawn
  const SHOWN_ARC = 0.01; // attention below this is not drawn

  function html(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  function svg(tag, attributes = {}, text = null) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== null) node.textContent = text;
    return node;
  }

  function select(name, options, value, changed) {
    const menu = html("select", { "aria-label": name.trim() });
    options.forEach(([key, label]) => menu.append(html("option", { value: key }, label)));
    menu.value = value;
    menu.addEventListener("change", () => changed(menu.value));
    const label = html("label", {}, name, menu);
    return { label, menu };
  }

  function toggle(label, pressed, clicked) {
    const button = html("button", { type: "button", "aria-pressed": pressed }, label);
    button.addEventListener("click", clicked);
    return button;
  }

  const written = (value) => (Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(2));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  // The least of 1, 2 or 5 times a power of ten that is not below a number.
  function roundStep(least) {
    const power = 10 ** Math.floor(Math.log10(least));
    return power * [1, 2, 5, 10].find((times) => times * power >= least * 0.999999);
  }

  // Redraws when the width changes, not when a drawing changes its own height.
  function onWidth(node, draw) {
    let last = 0;
    new ResizeObserver(() => {
      if (node.clientWidth && node.clientWidth !== last) {
        last = node.clientWidth;
        draw(last);
      }
    }).observe(node);
  }

  // Arrow keys, Home and End go through `count` things.
  function onArrows(node, count, current, move) {
    node.addEventListener("keydown", (event) => {
      const to = { ArrowLeft: current() - 1, ArrowRight: current() + 1, Home: 0, End: count - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      move(Math.min(Math.max(to, 0), count - 1));
    });
  }

  // circuitsvis takes up to a second for the heads of a layer: they are drawn when they come into sight or before a
  // print, and otherwise one by one when the page has nothing else to do.
  const waiting = [];
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 200));
  function whenSeen(node, draw) {
    let drawn = false;
    const once = () => {
      if (drawn) return;
      drawn = true;
      sight.disconnect();
      draw();
    };
    const sight = new IntersectionObserver((seen) => seen.some((entry) => entry.isIntersecting) && once(), {
      rootMargin: "200px",
    });
    sight.observe(node);
    addEventListener("beforeprint", once);
    waiting.push(once);
    if (waiting.length === 1) setTimeout(() => idle(next), 500);
  }
  function next() {
    waiting[0]();
    waiting.shift();
    if (waiting.length) setTimeout(() => idle(next), 50);
  }

  // ---- characters at their positions -------------------------------------------------------------------------------

  // A special token can be long: the readout has all of it.
  function short(unit) {
    const characters = [...unit];
    return characters.length > LONGEST ? `${characters.slice(0, LONGEST - 1).join("")}…` : unit;
  }

  function glyphWidth(unit) {
    let width = 0;
    for (const c of short(unit)) width += /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60]/.test(c) ? 1 : 0.62;
    return width;
  }

  // Pixels that a unit of the axis must have for three in four neighbours to stand clear of each other.
  function pixelsNeeded(units, rows) {
    const needed = [];
    let widths = 0;
    let gaps = 0;
    for (const row of rows) {
      for (let i = 0; i + 1 < units.length; i++) {
        const width = ((glyphWidth(units[i]) + glyphWidth(units[i + 1])) / 2) * TYPE * 0.9;
        const gap = Math.max(Math.abs(row.x[i + 1] - row.x[i]), 1e-6);
        needed.push(width / gap);
        widths += width;
        gaps += gap;
      }
    }
    if (!needed.length) return TYPE;
    needed.sort((a, b) => a - b);
    return Math.min(needed[Math.floor(((needed.length - 1) * 3) / 4)], (2 * widths) / gaps);
  }

  // Runs of units, each cut after whitespace or punctuation where some is near.
  function panelsOf(data, count) {
    const cuts = [0];
    const n = data.units.length;
    for (let number = 1; number < count; number++) {
      const even = Math.round((number * n) / count);
      const reach = Math.floor(n / (4 * count));
      let cut = even;
      for (let step = 0; step <= reach; step++) {
        const found = [even - step, even + step].find((at) => at > cuts[cuts.length - 1] && at < n && data.boundary[at - 1]);
        if (found !== undefined) {
          cut = found;
          break;
        }
      }
      if (cut > cuts[cuts.length - 1]) cuts.push(cut);
    }
    cuts.push(n);
    return cuts.slice(0, -1).map((from, i) => [from, cuts[i + 1]]);
  }

  function spacing(root, data, saved, remember) {
    const state = { layer: "all", scale: data.relative ? "relative" : "common", chosen: -1 };
    if (saved.layer === "all" || (data.rows.length > 1 && data.rows[saved.layer])) state.layer = String(saved.layer);
    if (saved.scale === "common") state.scale = "common";
    if (isIndex(saved.chosen, data.units.length)) state.chosen = saved.chosen;
    const controls = html("div", { class: "lp-controls" });
    const holder = html("div", {
      class: "lp-drawing",
      tabindex: "0",
      role: "group",
      "aria-label": "Characters at their positions. Left and right arrows choose a character.",
    });
    const readout = html("div", { class: "lp-readout", "aria-live": "polite" });
    const caption = html("figcaption");
    if (data.rows.length > 1) {
      const options = [["all", "all"], ...data.rows.map((row, i) => [String(i), row.name])];
      controls.append(select("Layer ", options, state.layer, (value) => ((state.layer = value), draw())).label);
    }
    const scales = {};
    for (const [name, label] of [["relative", "relative to each row's mean"], ["common", "one scale, in steps"]]) {
      if (name === "relative" && !data.relative) continue;
      scales[name] = toggle(label, name === state.scale, () => {
        state.scale = name;
        for (const [other, button] of Object.entries(scales)) button.setAttribute("aria-pressed", other === name);
        draw();
      });
      controls.append(scales[name]);
    }
    root.append(controls, holder, readout, caption);

    function draw() {
      const chosenRows = state.layer === "all" ? data.rows : [data.rows[Number(state.layer)]];
      const rows = chosenRows.map((row) => {
        const unit = state.scale === "relative" ? row.mean : 1;
        return { ...row, x: row.first.map((p) => p / unit), end: row.last.map((p) => p / unit) };
      });
      const longest = Math.max(...rows.map((row) => row.name.length));
      const left = rows.length > 1 || longest > 6 ? Math.max(74, 6 * longest + 14) : 62;
      const width = Math.max(holder.clientWidth - left - 16, 120);
      const needed = pixelsNeeded(data.units, rows);
      let extent = 0;
      for (const row of rows) extent = Math.max(extent, Math.max(...row.end) - Math.min(...row.x));
      const count = Math.min(Math.max(Math.ceil((needed * extent) / width), 1), data.units.length);
      const panels = panelsOf(data, count);
      const ranges = panels.map(([from, to]) => {
        let low = Infinity;
        let high = -Infinity;
        for (const row of rows)
          for (let i = from; i < to; i++) {
            low = Math.min(low, row.x[i] - row.x[from]);
            high = Math.max(high, row.end[i] - row.x[from]);
          }
        return [low, high];
      });
      const widest = Math.max(...ranges.map(([low, high]) => high - low), 1e-6);
      const perUnit = (width - TYPE) / widest;
      holder.replaceChildren(...panels.map((panel, number) => drawPanel(rows, panel, ranges[number], perUnit, left)));
      caption.textContent = data.caption[state.scale];
      choose(state.chosen);
    }

    function drawPanel(rows, [from, to], [low], perUnit, left) {
      const rowHeight = 34;
      const across = holder.clientWidth;
      const foot = rows.length * rowHeight + 8;
      const high = foot + 34;
      const panel = svg("svg", {
        width: across,
        height: high,
        viewBox: `0 0 ${across} ${high}`,
        role: "img",
        "aria-label": `${data.units.slice(from, to).join("")}, ${rows.length === 1 ? "one row" : rows.length + " layers"}`,
        "data-per-unit": perUnit,
      });
      const at = (row, i) => left + TYPE / 2 + (row.x[i] - row.x[from] - low) * perUnit;
      rows.forEach((row, r) => {
        const y = r * rowHeight + 20;
        panel.append(svg("text", { x: left - 8, y: y - 3, "text-anchor": "end", "font-size": 11, class: "quiet" }, row.name));
        panel.append(svg("text", { x: left - 8, y: y + 10, "text-anchor": "end", "font-size": 10, class: "quiet" }, `mean ${written(row.mean)}`));
        for (let i = from; i < to; i++) {
          const mark = data.boundary[i] ? " mark" : "";
          if (r + 1 < rows.length) {
            const place = { x1: at(row, i), y1: y + 10, x2: at(rows[r + 1], i), y2: y + rowHeight - 15 };
            panel.append(svg("line", { ...place, class: `line${mark}`, "data-i": i }));
          }
          if (row.end[i] !== row.x[i]) {
            const end = at(row, i) + (row.end[i] - row.x[i]) * perUnit;
            panel.append(svg("line", { x1: at(row, i), x2: end, y1: y + 9, y2: y + 9, class: "bytes" }));
          }
          const place = { x: at(row, i), y: y + 4, "text-anchor": "middle", "font-size": TYPE - 1 };
          panel.append(svg("text", { ...place, class: `unit${mark}`, "data-i": i, "data-row": r }, short(data.units[i])));
        }
      });
      drawAxis(panel, { left: left + TYPE / 2, foot, across, low, perUnit, start: from });
      const nearest = (event) => {
        const box = panel.getBoundingClientRect();
        const row = rows[Math.min(Math.max(Math.floor((event.clientY - box.top) / rowHeight), 0), rows.length - 1)];
        let best = from;
        for (let i = from; i < to; i++)
          if (Math.abs(at(row, i) - (event.clientX - box.left)) < Math.abs(at(row, best) - (event.clientX - box.left))) best = i;
        choose(best);
      };
      panel.addEventListener("pointermove", nearest);
      panel.addEventListener("pointerdown", nearest);
      return panel;
    }

    // An axis in positions below a panel, from its first character on.
    function drawAxis(panel, { left, foot, across, low, perUnit, start }) {
      const most = low + (across - left - TYPE) / perUnit;
      const step = roundStep(70 / perUnit);
      const place = (position) => left + (position - low) * perUnit;
      panel.append(svg("line", { x1: left, x2: place(most), y1: foot, y2: foot, class: "line" }));
      for (let tick = Math.ceil(low / step); tick * step <= most; tick++) {
        const x = place(tick * step);
        panel.append(svg("line", { x1: x, x2: x, y1: foot, y2: foot + 4, class: "line" }));
        const label = Number((tick * step).toPrecision(6));
        panel.append(svg("text", { x, y: foot + 15, "text-anchor": "middle", "font-size": 10, class: "quiet tick" }, String(label)));
      }
      const unit = state.scale === "relative" ? "in mean increments of each row" : "in steps of standard RoPE";
      const from = start ? "the first character of this line" : "the first character";
      const whole = `position from ${from}, ${unit}`;
      const said = across < 480 ? (state.scale === "relative" ? "position, in mean increments" : "position, in steps of RoPE") : whole;
      panel.append(svg("text", { x: across < 480 ? 4 : left, y: foot + 30, "font-size": 11, class: "quiet" }, said));
    }

    function choose(i) {
      state.chosen = i;
      remember({ layer: state.layer, scale: state.scale, chosen: i });
      for (const node of holder.querySelectorAll(".chosen")) node.classList.remove("chosen");
      if (i < 0) return readout.replaceChildren("Point at a character, or use the arrow keys, to read its increments.");
      for (const node of holder.querySelectorAll(`[data-i="${i}"]`)) node.classList.add("chosen");
      const list = html("ul");
      for (const row of data.rows) {
        const steps = row.increments[i].map(written).join(" + ");
        list.append(html("li", {}, `${row.name}: ${steps} (at ${written(row.first[i])})`));
      }
      const tokens = data.rows[0].increments[i].length;
      const what = `“${data.units[i]}”, ${i + 1} of ${data.units.length}`;
      const several = tokens > 1 ? `, ${tokens} tokens` : "";
      readout.replaceChildren(html("strong", {}, what), `${several}: increments, in steps of standard RoPE`, list);
    }

    onArrows(holder, data.units.length, () => state.chosen, choose);
    onWidth(holder, draw);
  }

  // ---- circuitsvis -------------------------------------------------------------------------------------------------

  let made = 0;
  function circuits(parent, component, props) {
    const id = `lp-circuits-${made++}`;
    const target = html("div", { id });
    parent.replaceChildren(target);
    CircuitsVis.render(id, CircuitsVis[component], props);
    return target;
  }

  // circuitsvis writes a token as HTML where it tints it and as text in its tooltip: as the one child of an array it
  // is text to React, and what it is asked to replace in it is replaced in escaped HTML.
  function inert(label) {
    const escaped = label.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
    const token = [label];
    token.replace = (pattern, by) => escaped.replace(pattern, by);
    token.match = () => null;
    return token;
  }

  function tokens(root, data) {
    const paper = html("div", { class: "lp-paper" });
    root.append(paper, html("figcaption", {}, data.caption));
    data.rows.forEach((row) => {
      const tinted = html("div");
      paper.append(html("div", { class: "lp-row" }, html("span", {}, `${row.name}, mean ${written(row.mean)}`), tinted));
      circuits(tinted, "ColoredTokens", {
        tokens: data.labels.map(inert),
        values: row.relative,
        minValue: -1,
        maxValue: 1,
        negativeColor: data.nearer,
        positiveColor: data.farther,
        paddingBottom: 4,
      });
    });
  }

  // ---- attention beside increments ---------------------------------------------------------------------------------

  // Lower triangles of whole numbers up to 65535, as they are packed in views.py.
  function unpack(text, heads, length) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const values = new Uint16Array(bytes.buffer);
    let at = 0;
    return Array.from({ length: heads }, () =>
      Array.from({ length }, (_, query) =>
        Array.from({ length }, (_, key) => (key <= query ? values[at++] / 65535 : 0)),
      ),
    );
  }

  function attention(root, data, saved, remember) {
    const n = data.labels.length;
    const state = {
      layer: isIndex(saved.layer, data.rows.length) ? saved.layer : data.layer,
      head: isIndex(saved.head, data.heads) ? saved.head : data.head,
      token: isIndex(saved.token, n) ? saved.token : n - 1,
    };
    const unpacked = {};
    const patterns = (layer) => (unpacked[layer] ??= unpack(data.patterns[layer], data.heads, n));
    const controls = html("div", { class: "lp-controls" });
    const rulers = html("div", {
      class: "lp-scroll lp-drawing",
      tabindex: "0",
      role: "group",
      "aria-label": "Attention on two rulers. Left and right arrows choose the token that attends.",
    });
    const readout = html("div", { class: "lp-readout", "aria-live": "polite" });
    const paper = html("div", { class: "lp-paper lp-heads" });
    const layers = select("Layer ", data.rows.map((row, i) => [String(i), row.name]), String(state.layer), (value) => {
      state.layer = Number(value);
      drawHeads();
      draw();
    });
    const named = (head) => `L${data.rows[state.layer].name.split(" ")[1]}H${head}`;
    const all = Array.from({ length: data.heads }, (_, head) => head);
    const heads = select("Head ", all.map((head) => [String(head), `head ${head}`]), String(state.head), (value) => choose(Number(value)));
    const options = data.labels.map((label, i) => [String(i), `${i}: ${label}`]);
    const chosen = select("Token ", options, String(state.token), (value) => attend(Number(value)));
    controls.append(layers.label, heads.label, chosen.label);
    root.append(controls, rulers, readout, html("figcaption", {}, data.caption), paper);

    function positions() {
      const row = data.rows[state.layer];
      return row.positions[Math.floor((state.head * row.positions.length) / data.heads)];
    }

    function draw() {
      remember({ ...state });
      const at = positions();
      const weights = patterns(state.layer)[state.head][state.token];
      const lengths = data.labels.map((label) => [...label].length);
      const upright = lengths.filter((length) => length > 2).length <= n / 10;
      const labelHeight = upright ? 20 : 66;
      const arcs = 96;
      const width = Math.max(rulers.clientWidth, n * 13 + 40, 300);
      const top = arcs + 22;
      const bottom = top + 2 * labelHeight + 34;
      const height = bottom + arcs + 26;
      const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
      picture.setAttribute("aria-label", `Attention of token ${state.token} on the ruler of positions and of token counts`);
      const low = Math.min(...at);
      const span = Math.max(...at) - low || 1;
      const learned = (i) => 20 + ((at[i] - low) / span) * (width - 40);
      const counted = (i) => 20 + (i / Math.max(n - 1, 1)) * (width - 40);
      const title = (y, text) => picture.append(svg("text", { x: 4, y, "font-size": 11, class: "quiet" }, text));
      title(12, data.static ? "positions of a static model" : "learned positions");
      title(bottom + arcs + 20, "token counts");
      for (const [y, place, side] of [[top, learned, -1], [bottom, counted, 1]]) {
        picture.append(svg("line", { x1: 20, x2: width - 20, y1: y, y2: y, class: "line" }));
        for (let key = 0; key <= state.token; key++) {
          const weight = weights[key];
          if (weight < SHOWN_ARC) continue;
          const [from, to] = [place(state.token), place(key)];
          const reach = Math.min(Math.abs(from - to) / 2, arcs);
          const sweep = from > to === side < 0 ? 0 : 1;
          const shape = Math.abs(from - to) < 1
            ? `M ${from - 4} ${y} a 4 6 0 1 ${side < 0 ? 1 : 0} 8 0`
            : `M ${from} ${y} A ${Math.abs(from - to) / 2} ${reach} 0 0 ${sweep} ${to} ${y}`;
          const look = { "stroke-width": 0.6 + 5 * weight, opacity: 0.35 + 0.65 * weight };
          const where = { "data-key": key, "data-weight": weight, "data-x": to, "data-ruler": side < 0 ? "learned" : "counted" };
          picture.append(svg("path", { d: shape, class: "arc", ...look, ...where }));
        }
      }
      for (let i = 0; i < n; i++) {
        picture.append(
          svg("line", { x1: learned(i), x2: counted(i), y1: top + labelHeight + 8, y2: bottom - labelHeight - 8, class: "line" }),
        );
        for (const [y, place, side] of [[top, learned, -1], [bottom, counted, 1]]) {
          const down = side < 0 ? y + 16 : y - 8;
          const turned = { transform: `rotate(-90 ${place(i)} ${side < 0 ? y + 6 : y - 6})`, "text-anchor": side < 0 ? "end" : "start" };
          const where = upright
            ? { x: place(i), y: down, "text-anchor": "middle" }
            : { x: place(i), y: (side < 0 ? y + 6 : y - 6) + 4, ...turned };
          const most = upright ? 2 : 10;
          const label = lengths[i] > most ? `${[...data.labels[i]].slice(0, most - 1).join("")}…` : data.labels[i];
          const look = `token${i === state.token ? " chosen" : i > state.token ? " quiet" : ""}`;
          const word = svg("text", { ...where, "font-size": 12, class: look, "data-token": i, "data-ruler": side < 0 ? "learned" : "counted" }, label);
          word.addEventListener("click", () => attend(i));
          picture.append(word);
          picture.append(svg("line", { x1: place(i), x2: place(i), y1: y - 3, y2: y + 3, class: "line" }));
        }
      }
      rulers.replaceChildren(picture);
      const [from, to] = [learned(state.token), counted(state.token)].sort((a, b) => a - b);
      if (from < rulers.scrollLeft + 20 || to > rulers.scrollLeft + rulers.clientWidth - 20) rulers.scrollLeft = to - rulers.clientWidth + 40;
      const ranked = weights.map((weight, key) => [weight, key]).slice(0, state.token + 1).sort((a, b) => b[0] - a[0]).slice(0, 5);
      const list = html("ul");
      for (const [weight, key] of ranked) {
        const count = state.token - key;
        const back = `${count} ${count === 1 ? "token" : "tokens"}, ${written(at[state.token] - at[key])} positions back`;
        list.append(html("li", {}, `${(100 * weight).toFixed(1)}% “${data.labels[key]}” (${back})`));
      }
      const row = data.rows[state.layer];
      const increments = row.increments[Math.floor((state.head * row.increments.length) / data.heads)];
      const what = `“${data.labels[state.token]}”, token ${state.token}, ${row.name}, head ${state.head}`;
      readout.replaceChildren(html("strong", {}, what), `: increment ${written(increments[state.token])}; attends to`, list);
    }

    function drawHeads() {
      const target = circuits(paper, "AttentionHeads", {
        attention: patterns(state.layer),
        tokens: data.labels,
        attentionHeadNames: all.map(named),
        minValue: 0,
        maxValue: 1,
        positiveColor: data.positive,
        maskUpperTri: true,
      });
      // Its thumbnails answer the mouse alone: here they are buttons, and choose the head of the rulers too.
      const wait = new MutationObserver(() => {
        const found = [...target.querySelectorAll("h4")];
        if (found.length < data.heads) return;
        wait.disconnect();
        found.forEach((name, head) => {
          const thumbnail = name.parentElement.parentElement;
          thumbnail.setAttribute("role", "button");
          thumbnail.setAttribute("tabindex", "0");
          thumbnail.setAttribute("aria-label", `${data.rows[state.layer].name}, head ${head}`);
          thumbnail.addEventListener("click", () => choose(head, false));
          thumbnail.addEventListener("keydown", (event) => {
            if (event.key !== "Enter" && event.key !== " ") return;
            event.preventDefault();
            thumbnail.click();
          });
        });
        for (const canvas of target.querySelectorAll("canvas")) canvas.setAttribute("role", "img");
        if (state.head) found[state.head].parentElement.parentElement.click();
      });
      wait.observe(target, { childList: true, subtree: true });
    }

    function choose(head, tell = true) {
      state.head = head;
      heads.menu.value = String(head);
      if (tell) paper.querySelectorAll('[role="button"]')[head]?.click();
      draw();
    }

    function attend(token) {
      state.token = token;
      chosen.menu.value = String(state.token);
      draw();
    }

    onArrows(rulers, n, () => state.token, attend);
    onWidth(rulers, draw);
    whenSeen(paper, drawHeads);
  }

  // ---- the page ----------------------------------------------------------------------------------------------------

  // Two different ideographs that look the same are two empty boxes.
  function drawsChinese() {
    const canvas = html("canvas", { width: 40, height: 40 });
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    const picture = (text) => {
      pen.clearRect(0, 0, 40, 40);
      pen.font = `30px ${getComputedStyle(document.body).fontFamily}`;
      pen.fillText(text, 4, 32);
      return pen.getImageData(0, 0, 40, 40).data.join();
    };
    return picture("国") !== picture("天");
  }

  // What is selected in the views of a page, by their order in it, and the part that was gone to: "#part&{...}". A view
  // that nobody touched has nothing in the address.
  const address = fromAddress();
  function fromAddress() {
    const [part, ...rest] = location.hash.slice(1).split("&");
    try {
      const views = JSON.parse(decodeURIComponent(rest.join("&")));
      return { part, views: views && typeof views === "object" ? views : {} };
    } catch {
      return { part, views: {} };
    }
  }
  function remember(changes) {
    Object.assign(address, changes);
    if (location.protocol === "about:") return; // a frame in a notebook
    const views = Object.keys(address.views).length ? `&${encodeURIComponent(JSON.stringify(address.views))}` : "";
    const hash = `#${address.part}${views}`;
    if (hash !== (location.hash || "#")) history.replaceState(null, "", hash);
  }
  window.lensPositions = { remember, part: () => address.part };

  // A view tells all of its state at every drawing: what it was drawn with first is no selection.
  function rememberer(number) {
    let first = null;
    return (state) => {
      const told = JSON.stringify(state);
      first ??= told;
      if (told === first && !address.views[number]) return;
      remember({ views: { ...address.views, [number]: state } });
    };
  }
  const isIndex = (value, count) => Number.isInteger(value) && value >= 0 && value < count;

  // What has to be scrolled sideways says so.
  function cue(box) {
    const said = html("p", { class: "lp-cue", "aria-hidden": "true" }, "scroll sideways →");
    said.hidden = true;
    box.before(said);
    const look = () => (said.hidden = box.scrollWidth <= box.clientWidth + 1);
    new ResizeObserver(look).observe(box);
    new MutationObserver(look).observe(box, { childList: true, subtree: true });
    box.closest("details")?.addEventListener("toggle", look);
    look();
  }

  const kinds = { spacing, tokens, attention };
  let mounted = 0;
  function mount() {
    for (const figure of document.querySelectorAll(".lp-view[data-view]:not([data-mounted])")) {
      figure.dataset.mounted = "";
      const text = figure.querySelector('script[type="application/json"]').textContent;
      if (/\\u(4[ef]|[5-9])/i.test(text) && !drawsChinese()) {
        const missing = "This device has no font that draws Chinese: install one, such as Noto Sans CJK.";
        figure.append(html("p", { class: "lp-fontless" }, missing));
      }
      const saved = address.views[mounted];
      kinds[figure.dataset.view](figure, JSON.parse(text), saved && typeof saved === "object" ? saved : {}, rememberer(mounted));
      mounted++;
    }
    document.querySelectorAll(".lp-scroll, .lp-paper").forEach(cue);
    if (window.frameElement)
      new ResizeObserver(() => (window.frameElement.style.height = `${document.documentElement.offsetHeight + 4}px`)).observe(document.body);
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mount);
  else mount();
})();
