// The explorer as a widget of a notebook (anywidget): what a server answers elsewhere, the kernel answers here.

const PATIENCE = 30_000; // milliseconds

function render({ model, el }) {
  const root = document.createElement("div");
  root.classList.add("lp-notebook");
  root.addEventListener("keydown", keepKey);
  el.append(root);
  const waiting = new Map();

  // A widget may be shown in several places, and each of them hears every answer.
  const view = Math.random().toString(36).slice(2);
  let count = 0;
  const question = (name, state = {}) =>
    new Promise((done, failed) => {
      const own = `${view}-${++count}`;
      const late = () => failed(new Error("The kernel does not answer: this is what it said last. Run the cell again."));
      waiting.set(own, { done, failed, timer: setTimeout(late, PATIENCE) });
      model.send({ number: own, question: name, state });
    });
  const answered = (message) => {
    const asked = waiting.get(message.number);
    if (!asked) return;
    waiting.delete(message.number);
    clearTimeout(asked.timer);
    if (message.answer.error) asked.failed(new Error(message.answer.error));
    else asked.done(message.answer);
  };
  model.on("msg:custom", answered);

  const ask = {
    run: (state) => question("run", state),
    slopes: (state) => question("slopes", state),
    page: (state) => question("page", state).then(({ page }) => page),
    circuits: () => question("circuits").then(({ script }) => void document.head.append(html("script", {}, script))),
  };
  let saved = null;
  const app = mount(root, ask, {
    start: model.get("state"),
    first: model.get("result"),
    save: (state) => {
      saved = state;
      model.set("state", state);
      model.save_changes();
    },
  });
  const changed = () => model.get("state") !== saved && app.show(model.get("state"));
  model.on("change:state", changed);
  return () => {
    model.off("msg:custom", answered);
    model.off("change:state", changed);
  };
}

// Keys that are pressed here are not the notebook's: "d d" would delete the cell, and Ctrl+Z undo an edit of its code as
// well. Its own shortcuts with Ctrl or Alt, such as to save it or to run the cell, still reach it.
function keepKey(event) {
  const shortcut = event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key === "Enter");
  if (!shortcut || event.defaultPrevented || /^[zy]$/i.test(event.key)) event.stopPropagation();
}

export default { render };
