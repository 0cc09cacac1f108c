// The explorer: one state, one picture of it. What a page shows follows from the state alone, which stands in its
// address; what runs the model is handed in, a server's or a notebook's.

import { html, menu, update } from "./dom.js";
import { attention, edits, heads, prediction, strip } from "./panels.js";
import { rulers } from "./rulers.js";

const TYPED = 250; // milliseconds after the last key of a text
const IDLE = 350; // milliseconds after the last answer before slopes are asked for
const UNDRAWN = 100; // milliseconds without a drawing, after which an answer is drawn although a newer one is to come
const ASKED = ["model", "text", "edits", "token", "layer", "head", "pattern"]; // of a state, what the model is asked with

// options: models [name], start (a state), first (its answer, where it is known), still (an answer to show without a
// model), save (called with each new state).
// ask: {run(state), slopes(state), page(state), circuits()} -> promises.
export function mount(root, ask, options) {
  const app = new App(root, ask, options);
  app.begin();
  return app;
}

class App {
  constructor(root, ask, options) {
    this.root = root;
    this.ask = ask;
    this.options = options;
    this.still = options.still !== undefined;
    this.state = { scale: "each", scope: "layer", from: 0, to: 0, edits: [], token: null, gap: { layer: null, token: 1 }, pattern: false, ...options.start };
    this.text = null;
    this.result = null;
    this.slopes = null;
    this.past = [];
    this.future = [];
    this.asked = []; // questions on their way, the newest last
    this.shown = null; // the question whose answer is drawn
    this.failed = null; // one that the model refused
    this.drawn = 0; // when an answer was drawn
    this.typed = null; // something was typed and not read yet
  }

  begin() {
    this.rulers = rulers(this);
    this.strip = strip(this);
    this.panels = [prediction(this), edits(this), heads(this), attention(this)];
    this.compose();
    this.tellBusy();
    const first = this.options.still ?? this.options.first;
    if (first) this.answered(first);
    else this.request();
    this.tellBusy();
    addEventListener("pagehide", () => this.saveNow()); // no frame comes then
  }

  // ---- what is looked at, and what is in hand -----------------------------------------------------------------------

  get rightToLeft() {
    return getComputedStyle(this.strip.node.firstChild).direction === "rtl";
  }

  looked() {
    return this.result.looked.token;
  }

  look(change) {
    this.state = { ...this.state, ...change };
    this.save();
    this.request();
  }

  take(layer, token) {
    const gap = { layer, token };
    if (gap.layer === this.state.gap.layer && gap.token === this.state.gap.token) return;
    this.state = { ...this.state, gap };
    this.save();
    this.draw();
  }

  // The layers that an edit reaches: null is all of them.
  scopeLayers(layer = this.state.gap.layer) {
    if (this.state.scope === "all") return null;
    if (this.state.scope === "layer") return [layer];
    const [from, to] = [this.state.from, this.state.to].sort((a, b) => a - b);
    const found = this.text.layers.filter((known) => known >= from && known <= to);
    return found.length ? found : [layer];
  }

  scopeEntries() {
    const layers = this.scopeLayers() ?? this.text.layers;
    return layers.map((layer) => this.text.layers.indexOf(layer));
  }

  inScope(layer) {
    return (this.scopeLayers() ?? this.text.layers).includes(layer);
  }

  scopeWords() {
    const layers = this.scopeLayers();
    if (layers === null) return "all layers in sum";
    return layers.length === 1 ? `layer ${layers[0]}` : `layers ${layers[0]} to ${layers[layers.length - 1]} in sum`;
  }

  // ---- edits --------------------------------------------------------------------------------------------------------

  // A gap made longer by so much since it was taken in hand. On the way nothing is kept; at the end it is one step.
  pull(token, by, done) {
    this.rest ??= this.state.edits;
    const layers = this.scopeLayers();
    let changed = this.rest;
    const last = changed[changed.length - 1];
    let whole = by;
    if (last && last.kind === "gap" && last.token === token && same(last.layers, layers)) {
      whole += last.by;
      changed = changed.slice(0, -1);
    }
    whole = Number(whole.toPrecision(6));
    if (Math.abs(whole) > 1e-6) changed = [...changed, { kind: "gap", layers, token, by: whole }];
    if (done) {
      const rest = this.rest;
      this.letGo();
      this.commit({ edits: changed }, { edits: rest });
    } else {
      this.state = { ...this.state, edits: changed };
      this.pulled = by;
      this.request();
    }
  }

  letGo() {
    this.rest = null;
    this.pulled = 0;
  }

  // An edit that makes a gap something, in place of what was done to that gap in the same layers.
  put(edit) {
    const layers = this.scopeLayers();
    const rest = this.state.edits.filter((known) => !(known.token === edit.token && same(known.layers, layers)));
    this.commit({ edits: [...rest, { ...edit, layers }] });
  }

  add(edit) {
    this.commit({ edits: [...this.state.edits, { ...edit, layers: this.scopeLayers() }] });
  }

  remove(index) {
    this.commit({ edits: this.state.edits.filter((_, i) => i !== index) });
  }

  reset(token) {
    const layers = this.scopeLayers();
    const rest = this.state.edits.filter((known) => !(known.token === token && same(known.layers, layers)));
    if (rest.length !== this.state.edits.length) this.commit({ edits: rest });
  }

  commit(change, before = {}) {
    this.past.push({ ...this.core(), ...before });
    this.future = [];
    this.state = { ...this.state, ...change };
    this.request(true);
    this.save();
  }

  core() {
    const { model, text, edits } = this.state;
    return { model, text, edits };
  }

  step(from, to) {
    const found = from.pop();
    if (!found) return;
    to.push(this.core());
    this.state = { ...this.state, ...found };
    this.fields.text.value = this.state.text;
    if (this.fields.model) this.fields.model.value = this.state.model;
    this.request(true);
    this.save();
  }

  undo() {
    this.step(this.past, this.future);
  }

  redo() {
    this.step(this.future, this.past);
  }

  // Another text: edits of gaps belong to the one before.
  read(text) {
    this.typed = null;
    this.tellBusy();
    if (!text || text === this.state.text) return;
    const kept = this.state.edits.filter((edit) => edit.kind === "ablate");
    const dropped = this.state.edits.length - kept.length;
    this.commit({ text, edits: kept, token: null, gap: { layer: this.state.gap.layer, token: 1 } });
    if (dropped) this.notice = `${dropped} ${dropped === 1 ? "edit" : "edits"} of the text before ${dropped === 1 ? "is" : "are"} gone; undo brings them back.`;
  }

  // Another state, from outside.
  show(state) {
    this.state = { ...this.state, ...state };
    this.fields.text.value = this.state.text;
    this.request();
  }

  // ---- asking the model ---------------------------------------------------------------------------------------------

  // What the page should show the answer to.
  wanted() {
    return questionOf(this.state);
  }

  // Whether that is still to come.
  pending() {
    const wanted = this.wanted();
    return wanted !== this.shown && wanted !== this.failed;
  }

  // One question at a time, and then the newest of what changed meanwhile; an edit that is made (`now`) does not wait for
  // the one before it, which is dropped if the model has not begun with it. Nothing is asked twice in a row.
  request(now = false) {
    if (this.still) return;
    const wanted = this.wanted();
    const last = this.asked[this.asked.length - 1];
    if (wanted === this.shown) this.settle();
    else if (last?.text !== wanted && this.asked.length < (now ? 2 : 1)) this.send(wanted);
    this.tellBusy();
  }

  // The answer to what is wanted is there already.
  settle() {
    this.failed = null;
    this.say("", false);
    this.rulers.answered(this.pulled ?? 0, true);
    this.draw();
    this.idle ??= setTimeout(() => this.requestSlopes(), IDLE);
  }

  async send(text) {
    const question = { text, pulled: this.pulled ?? 0 };
    this.asked.push(question);
    this.failed = null;
    clearTimeout(this.idle);
    this.idle = null;
    let [answer, error] = [null, null];
    try {
      answer = await this.ask.run({ ...JSON.parse(text), known: this.text?.key ?? "" });
    } catch (found) {
      error = found;
    }

    // Questions before this one are of no use any more. What changed meanwhile is asked before anything is drawn, so that
    // the model runs while the page draws.
    const place = this.asked.indexOf(question);
    this.asked.splice(0, place + 1);
    if (place < 0) return;
    if (error && text === this.wanted()) this.failed = text;
    const again = this.asked.length === 0 && this.pending() && text !== this.wanted();
    if (again) this.send(this.wanted());
    if (error) this.refused(error);
    else this.receive(answer, question);
    if (!this.asked.length && this.pending()) this.send(this.wanted());
    this.tellBusy();
    if (!this.asked.length && this.text) this.idle ??= setTimeout(() => this.requestSlopes(), IDLE);
  }

  receive(answer, { text, pulled }) {
    // Of a text that the page does not show any more, or not even begun with, as a newer question came.
    if (answer.stale || (answer.text === undefined && answer.key !== this.text.key)) return;
    const last = text === this.wanted();
    const late = performance.now() - this.drawn > UNDRAWN;
    if (!last && !late && !this.rulers.dragging()) return;
    if (!last && this.wanted() === this.shown) return;
    this.rulers.answered(pulled, last);
    this.answered(answer, JSON.parse(text));
  }

  refused(error) {
    this.rulers.answered(null, true);
    this.draw();
    this.say(error.message, true);
  }

  async requestSlopes() {
    this.idle = null;
    const { key } = this.text;
    if (this.slopes || this.sloping || this.asked.length || this.rulers.dragging()) return;
    this.sloping = true;
    try {
      const answer = await this.ask.slopes({ model: this.state.model, text: this.state.text });
      if (answer.key === key && this.text.key === key) {
        this.slopes = answer.slopes;
        this.strip.draw();
      }
    } catch (error) {
      this.say(error.message, true);
    }
    this.sloping = false;
  }

  answered(answer, asked = this.state) {
    const fresh = answer.text !== undefined;
    if (fresh) {
      this.text = { ...answer.text, key: answer.key };
      this.slopes = answer.slopes ?? null;
    }
    this.result = answer;
    const { layer, head } = answer.looked;
    const whole = (state) => ({ ...state, layer: state.layer ?? layer, head: state.head ?? head });
    const gap = this.state.gap;
    const known = this.text.layers.includes(gap.layer) ? gap.layer : this.text.layers[0];
    const token = Math.min(Math.max(gap.token, 0), this.text.labels.length - 1);
    this.state = { ...whole(this.state), gap: { layer: known, token } };
    this.shown = questionOf(whole(asked));
    this.drawn = performance.now();
    if (fresh) {
      this.rulers.build();
      this.strip.build();
      this.composeTools();
    }
    this.say(this.notice ?? "", false);
    this.notice = null;
    this.draw();
  }

  withCircuits(then) {
    if (globalThis.CircuitsVis) then();
    else this.ask.circuits?.().then(then, (error) => this.say(error.message, true));
  }

  // ---- the page -----------------------------------------------------------------------------------------------------

  compose() {
    const { models = [] } = this.options;
    this.fields = {};
    this.said = html("p", { class: "lp-said", role: "status" });
    const button = (label, does, more = {}) => html("button", { type: "button", click: does, ...more }, label);
    const bar = html("div", { class: "lp-row-of lp-bar" });
    if (models.length > 1) {
      const choice = menu("Model", models.map((name) => [name, name]), this.state.model, (model) => this.commit({ model, edits: [], layer: null, head: null }));
      this.fields.model = choice.querySelector("select");
      bar.append(choice);
    } else bar.append(html("strong", {}, this.state.model ?? ""));
    if (!this.still) {
      this.fields.undo = button("Undo", () => this.undo(), { title: "Ctrl+Z" });
      this.fields.redo = button("Redo", () => this.redo(), { title: "Ctrl+Shift+Z" });
      bar.append(html("span", { class: "lp-spring" }), this.fields.undo, this.fields.redo);
    }
    this.fields.copy = button("Copy as Python", () => this.copy());
    bar.append(this.fields.copy);
    if (this.ask?.page) bar.append(button("Save as page", () => this.savePage()));
    bar.append(button("Theme", () => theme(this.root), { "aria-label": "Switch between dark and light" }));

    this.fields.text = html("textarea", {
      rows: 2,
      dir: "auto",
      spellcheck: "false",
      readonly: this.still,
      "aria-label": "Text",
      input: () => {
        clearTimeout(this.typed);
        this.typed = setTimeout(() => this.read(this.fields.text.value), TYPED);
        this.tellBusy();
      },
    });
    this.fields.text.value = this.state.text ?? "";
    this.tools = html("div", { class: "lp-tools" });
    const scale = menu("Scale", [["each", "each layer fills the width"], ["one", "one for all layers"]], this.state.scale, (value) => {
      this.state = { ...this.state, scale: value };
      this.save();
      this.draw();
    });
    const keys =
      "Drag a token; or take a gap with ← → and pull it with ↑ ↓ (0.1, with Shift 1), Delete undoes it. " +
      "The axis is in positions: 1 is one step of standard RoPE. Grey: where tokens stood before the edits.";
    const [next, list, changed, seen] = this.panels.map((panel) => panel.node);
    this.root.classList.add("lp-explorer");
    this.root.replaceChildren(
      bar,
      this.fields.text,
      this.strip.node,
      this.said,
      html(
        "div",
        { class: "lp-columns" },
        html(
          "section",
          { class: "lp-panel lp-main" },
          html("div", { class: "lp-row-of" }, html("h2", {}, "Tokens at their positions"), html("span", { class: "lp-spring" }), scale),
          this.tools,
          this.rulers.node,
          html("p", { class: "lp-note" }, this.still ? "Grey: where tokens stood before the edits." : keys),
        ),
        html("div", { class: "lp-side" }, next, list, changed),
        seen,
      ),
    );
    if (!this.still)
      this.root.addEventListener("keydown", (event) => {
        if (!(event.ctrlKey || event.metaKey) || event.target.matches("textarea, input")) return;
        const key = event.key.toLowerCase();
        if (key === "z" && !event.shiftKey) this.undo();
        else if (key === "y" || key === "z") this.redo();
        else return;
        event.preventDefault();
      });
  }

  // What can be done with the gap in hand, and with whole layers.
  composeTools() {
    const { layers } = this.text;
    const { state } = this;
    if (this.still || same(this.tools.layers, layers)) return;
    this.tools.layers = layers;
    const button = (label, does) => html("button", { type: "button", class: "lp-small", click: does }, label);
    const number = (label, attributes) => {
      const input = html("input", { type: "number", step: "0.1", "aria-label": label, ...attributes });
      return [html("label", { class: "lp-field" }, html("span", {}, label), input), input];
    };
    const token = () => this.state.gap.token;
    const [field, gap] = number("becomes", { change: () => gap.value !== "" && token() > 0 && this.put({ kind: "set", token: token(), to: Number(gap.value) }) });
    const names = layers.map((layer) => [layer, `layer ${layer}`]);
    const range = (name) => menu(name, names, state[name], (value) => this.look({ [name]: Number(value) }));
    if (!layers.includes(state.from)) this.state = { ...this.state, from: layers[0], to: layers[layers.length - 1] };
    const ends = html("span", { class: "lp-row-of" }, range("from"), range("to"));
    const scope = menu("acts in", [["layer", "its layer"], ["range", "a range of layers"], ["all", "all layers"]], state.scope, (value) => this.look({ scope: value }));
    const other = html("input", { type: "text", dir: "auto", "aria-label": "Another text", placeholder: "another text" });
    const [sourceField, source] = number("its token", { min: "1", step: "1", value: "1" });
    const ablation = menu("Every gap becomes", [["1", "1"], ["mean", "the layer's mean"], ["shuffle", "another's (shuffled)"]], "1", () => {});
    const chosen = ablation.querySelector("select");
    Object.assign(this.fields, { gap, ends, title: html("strong", {}, html("span"), html("bdi"), html("span")) });
    this.tools.replaceChildren(
      html(
        "div",
        { class: "lp-row-of" },
        this.fields.title,
        field,
        scope,
        ends,
        button("1", () => token() > 0 && this.put({ kind: "set", token: token(), to: 1 })),
        button("Layer's mean", () => token() > 0 && this.put({ kind: "mean", token: token() })),
        button("As it was", () => this.reset(token())),
      ),
      html(
        "details",
        {},
        html("summary", {}, "Another text, whole layers"),
        html(
          "div",
          { class: "lp-row-of" },
          other,
          sourceField,
          button("Take its gap", () => other.value && token() > 0 && this.put({ kind: "like", token: token(), text: other.value, source: Number(source.value) })),
          button("Freeze the layer to it", () => other.value && this.add({ kind: "freeze", text: other.value })),
        ),
        html("div", { class: "lp-row-of" }, ablation, button("Ablate the layer", () => this.add({ kind: "ablate", to: chosen.value === "1" ? 1 : chosen.value }))),
      ),
    );
  }

  draw() {
    if (!this.result || !this.text) return;
    this.strip.draw();
    this.rulers.redraw();
    for (const panel of this.panels) panel.draw();
    if (this.still) return;
    const { gap, ends, title, undo, redo } = this.fields;
    const { layer, token } = this.state.gap;
    const at = (this.result.after ?? this.text.before).positions[this.text.layers.indexOf(layer)];
    const [what, label, where] = title.children;
    update(what, { text: token > 0 ? "The gap before " : "Take a token: " });
    update(label, { text: `“${this.text.labels[token]}”` });
    update(where, { text: ` (layer ${layer}, token ${token})` });
    const length = token > 0 ? (at[token] - at[token - 1]).toFixed(2) : "";
    // Of the root, as some notebooks keep a widget in a shadow tree, which the document does not look into.
    if (this.root.getRootNode().activeElement !== gap && gap.value !== length) gap.value = length;
    ends.hidden = this.state.scope !== "range";
    undo.disabled = !this.past.length;
    redo.disabled = !this.future.length;
  }

  // Whether something is to come that the model was or will be asked for; slopes come when they come.
  tellBusy() {
    update(this.root, { "aria-busy": String(Boolean(this.asked.length || this.typed || (!this.still && this.pending()))) });
  }

  say(sentence, wrong) {
    update(this.said, { text: sentence, class: wrong ? "lp-said lp-wrong" : "lp-said" });
  }

  // The state goes to its address after the next frame: to write it takes longer than to draw an edit.
  save() {
    if (!this.options.save || this.unsaved) return;
    this.unsaved = true;
    requestAnimationFrame(() => setTimeout(() => this.saveNow()));
  }

  saveNow() {
    if (this.unsaved) this.options.save(this.state);
    this.unsaved = false;
  }

  async copy() {
    const { python } = this.result;
    try {
      await navigator.clipboard.writeText(python);
      this.say("Copied.", false);
    } catch {
      const shown = this.root.querySelector(".lp-python");
      shown.open = true;
      getSelection().selectAllChildren(shown.querySelector("pre"));
      this.say("This browser does not let a page copy: the lines are selected, copy them.", false);
    }
  }

  async savePage() {
    try {
      const page = await this.ask.page({ ...JSON.parse(this.wanted()), pattern: false });
      const link = html("a", { href: URL.createObjectURL(new Blob([page], { type: "text/html" })), download: "explorer.html" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    } catch (error) {
      this.say(error.message, true);
    }
  }
}

function theme(root) {
  const holder = document.body.matches(".lp-page") ? document.body : root;

  // One scheme where this page or a notebook has chosen it, both where the system does; "normal" is light.
  const scheme = getComputedStyle(holder).colorScheme;
  const dark = scheme.includes("dark") && (!scheme.includes("light") || matchMedia("(prefers-color-scheme: dark)").matches);
  holder.dataset.theme = dark ? "light" : "dark";
}

// What of a state the model is asked with, as text.
const questionOf = (state) => JSON.stringify(Object.fromEntries(ASKED.map((name) => [name, state[name]])));

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
