// Elements, numbers as they are written, and circuitsvis. Text only ever becomes text nodes: nothing in it can run.

const SVG = "http://www.w3.org/2000/svg";

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

// Write attributes that differ from what was written last ("text" is the content): a page is laid out anew for what is
// written, whether or not it was there before. null takes an attribute away.
export function update(node, attributes) {
  const known = (node.lpWritten ??= {});
  for (const [name, value] of Object.entries(attributes)) {
    if (known[name] === value) continue;
    known[name] = value;
    if (name === "text") node.textContent = value;
    else if (value === null) node.removeAttribute(name);
    else node.setAttribute(name, value);
  }
}

// One child for each item: those that are there are written anew, and only the difference is made or taken away.
export function fill(parent, items, make, write) {
  const { children } = parent;
  items.forEach((item, i) => write(children[i] ?? parent.appendChild(make()), item, i));
  while (children.length > items.length) parent.lastChild.remove();
}

// A menu in its label: options are [value, text] pairs.
export function menu(label, options, value, changed) {
  const select = html("select", { "aria-label": label, change: () => changed(select.value) });
  for (const [key, text] of options) select.append(html("option", { value: key }, text));
  select.value = value;
  return html("label", { class: "lp-field" }, html("span", {}, label), select);
}

// ---- numbers --------------------------------------------------------------------------------------------------------

export const written = (value) => (Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(2));
export const signed = (value, digits = 2) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
export const percent = (log) => {
  const share = 100 * Math.exp(log);
  return share >= 10 ? share.toFixed(0) + "%" : share >= 0.1 ? share.toFixed(1) + "%" : "<0.1%";
};

// ---- widths ---------------------------------------------------------------------------------------------------------

const WIDE = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff60\u{1f000}-\u{1faff}]/u;
const LONGEST = 12;

// A long label in short: a special token as brackets, other text by its beginning. Titles have all of it.
export function short(label) {
  const characters = [...label];
  if (/^<.{4,}>$/.test(label)) return "⟨…⟩";
  return characters.length > LONGEST ? characters.slice(0, LONGEST - 1).join("") + "…" : label;
}

export function widthOf(label, size) {
  let width = 0;
  for (const c of short(label)) width += WIDE.test(c) ? 1.05 : 0.62;
  return width * size;
}

// Marks of an axis: round numbers, at least `apart` pixels from each other, between two ends.
export function marks(low, high, perUnit, apart) {
  const least = apart / perUnit;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= least) ?? 10 * power;
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + 1e-9 && found.length < 400; k++) found.push(k * step);
  return found.map((at) => Number(at.toPrecision(10)));
}

// ---- circuitsvis ----------------------------------------------------------------------------------------------------

// circuitsvis finds its place by an id. Two widgets of a notebook have this script twice, so that counting is not enough.
export function circuits(parent, component, props) {
  const id = `lp-explorer-circuits-${Math.random().toString(36).slice(2)}`;
  const place = html("div", { id });
  parent.replaceChildren(place);
  const render = () => {
    // It looks in the document alone, not in the shadow tree in which some notebooks keep a widget; once it has found its
    // place, that may go anywhere.
    document.body.append(place);
    globalThis.CircuitsVis.render(id, globalThis.CircuitsVis[component], props);
    parent.replaceChildren(place);
  };
  if (place.isConnected) return render();

  // A notebook shows a widget only when it is made: a place has a size, and an id that is found, from then on.
  const seen = new ResizeObserver(() => {
    if (!place.isConnected) return;
    seen.disconnect();
    render();
  });
  seen.observe(place);
}

// Lower triangles of whole numbers up to 65535, as engine.py packs them.
export function unpack(text, length) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const values = new Uint16Array(bytes.buffer);
  let at = 0;
  return Array.from({ length }, (_, query) => Array.from({ length }, (_, key) => (key <= query ? values[at++] / 65535 : 0)));
}
