// The explorer in a page of the local server: the state is in the address, behind the "#", which no server is sent.

import { mount } from "./explorer.js";

const options = JSON.parse(document.getElementById("lp-options").textContent);
const token = new URLSearchParams(location.search).get("token") ?? "";
const tab = crypto.randomUUID();
let serial = 0;

async function post(path, state) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Explorer-Token": token, "X-Explorer-Tab": tab, "X-Explorer-Serial": ++serial },
    body: JSON.stringify(state),
  }).catch(() => {
    throw new Error("The explorer does not answer: it was stopped. Start it again and reload this page.");
  });
  if (answer.headers.get("Content-Type")?.startsWith("text/html")) return answer.text();
  const found = await answer.json().catch(() => ({ error: `The explorer answered with status ${answer.status}.` }));
  if (found.error) throw new Error(found.error);
  return found;
}

function fromAddress() {
  try {
    return JSON.parse(decodeURIComponent(location.hash.slice(1)));
  } catch {
    return {};
  }
}

let circuits = null;
const ask = {
  run: (state) => post("api/run", state),
  slopes: (state) => post("api/slopes", state),
  page: (state) => post("api/page", state),
  circuits: () =>
    (circuits ??= new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = "circuitsvis.js";
      script.onload = done;
      script.onerror = () => failed(new Error("circuitsvis could not be loaded."));
      document.head.append(script);
    })),
};

let app = null;
let saved = "";
function begin() {
  app = mount(document.querySelector("main"), ask, {
    models: options.models,
    start: { ...options.start, ...fromAddress() },
    save: (state) => {
      saved = `#${encodeURIComponent(JSON.stringify(state))}`;
      history.replaceState(null, "", saved);
    },
  });
}
begin();
addEventListener("hashchange", () => location.hash !== saved && begin());
