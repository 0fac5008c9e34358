"use strict";
// The page as a whole: the start, the link, and what the buttons do.

let isConnected = false;
const registerDialog = new RegisterDialog(registryChanged);
const randomDialog = new RandomDialog();

function settingsChanged() {
  configureForm();
  fillKinds();
  configureColumns();
  share();
  turnChanged();
}

/** Takes over what the server has now. */
async function registryChanged(text) {
  await refreshServer();
  refill();
  settingsChanged();
  about();
  say(text);
}

function share() {
  history.replaceState(null, "", `#${toFragment(fieldValues(), entriesNow(), columns.map(({ spec }) => spec))}`);
}

function fromLink() {
  const { fields, entries, specs, unread } = fromFragment(location.hash);
  stopAll();
  for (const column of columns.splice(0)) column.element.remove();
  turn = 1;
  lastAsked = "";
  fillForm(fields, entries);
  configureForm();
  fillKinds();
  const usual = directions.names.length ? [{ kind: "plain" }, { kind: "steered" }] : [{ kind: "plain" }];
  for (const spec of specs ?? usual) addColumn(spec);
  turnChanged();
  paint();
  const wrong = [...unread, ...complaints(), ...columns.map(({ missing }) => missing).filter(Boolean)];
  say(wrong.length ? `Not all of the link could be taken over. ${wrong.join(" ")}` : "");
}

function showCode(column, language) {
  const asked = settings();
  const [path, body] = [pathOf(asked), requestOf(column, asked)];
  byId("code-title").textContent = `${column.name}, as ${language === "curl" ? "curl" : "Python"}`;
  byId("code-text").value = (language === "curl" ? asCurl : asPython)(path, body);
  byId("code").showModal();
  byId("code-text").setSelectionRange(0, 0); // a text that was just set has its cursor at the end, and shows that
  byId("code-text").scrollTop = 0;
}

async function copy(text, field) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // not a secure context, or not allowed: the user can copy the selection
    field?.select();
    return Boolean(field) && document.execCommand("copy");
  }
}

function askKey() {
  byId("key-why").textContent = keys.api === null
    ? "This server wants an API key. The page keeps it in memory only: reloading forgets it."
    : "The server refused that API key. Try another one.";
  if (!byId("key").open) byId("key").showModal();
}

async function connect() {
  try {
    await refreshServer();
    const models = (await askJson("/v1/models")).data;
    model = (models.find(({ parent }) => !parent) ?? models[0]).id; // the others are steered already
  } catch (error) {
    byId("about").textContent = error.message;
    if (error.status === 401) askKey();
    return;
  }
  try {
    server.vllm = (await askJson("/version")).version;
  } catch { // a proxy may hide it
    server.vllm = null;
  }
  about();
  byId("ask-register").disabled = false;
  if (isConnected) return say("Connected with the new key.");
  isConnected = true;
  fromLink();
}

function about() {
  byId("about").textContent = `${model}, hooked at ${server.layers.length === 1 ? "layer" : "layers"} ${server.layers.join(", ")}. `
    + (server.directions.length ? "All columns share the settings; the name of a column says in what it differs from the others." : "No direction is registered yet, so nothing can be steered. Register one, or drop its file here.");
}

form.addEventListener("submit", (event) => { event.preventDefault(); run([...columns]); });
// the browser's own check would stop the event before the page can say what is wrong
form.noValidate = true;
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
});
document.querySelector("main").addEventListener("input", judgeColumns);
form.addEventListener("change", ({ target }) => { if (!target.closest(".entry")) settingsChanged(); });
byId("stop").addEventListener("click", stopAll);
byId("next-turn").addEventListener("click", () => nextTurn());
byId("restart").addEventListener("click", restart);
byId("add-entry").addEventListener("click", () => {
  const used = rows.map((row) => row.direction.value);
  const row = addRow({ direction: directions.names.find((name) => !used.includes(name)) ?? directions.names[0] });
  settingsChanged();
  row.direction.focus();
});
byId("add").addEventListener("click", () => {
  if (columns.length >= MOST_COLUMNS) return say(`There are ${MOST_COLUMNS} columns, the most that the chart can tell apart. Remove one first.`);
  const spec = JSON.parse(byId("kind").value);
  if (spec.random) return randomDialog.open();
  const column = addColumn(spec);
  column.strength.focus();
  share();
  return turnChanged();
});
byId("link").addEventListener("click", async () => {
  share();
  say(await copy(location.href) ? "Link copied. It holds the settings, the columns and the text in “Prompt” and “System prompt”; no key, no answers and no earlier turns." : "Copy the page's address: it holds the settings, the columns and the text in “Prompt” and “System prompt”; no key, no answers and no earlier turns.");
});
byId("save-json").addEventListener("click", () => save(new Blob([JSON.stringify(exported(server), null, 1)], { type: "application/json" }), fileName("json")));
byId("save-png").addEventListener("click", async () => {
  const { entries, prompt, system } = lastAsked ? JSON.parse(lastAsked) : settings();
  const steering = entries.map(({ direction, layer, op, span }) => `${direction} (${op}) at layer ${layer}, ${span}`).join("; ");
  save(await pictureOf(columns, { title: `${model}: ${steering || "unsteered"}`, asked: `${system ? `System: ${system}\n` : ""}${prompt}` }), fileName("png"));
});
// a field with a mistake must be seen, also in a folded part
form.addEventListener("invalid", ({ target }) => { const folded = target.closest("details"); if (folded) folded.open = true; }, true);
byId("more").open = matchMedia("(min-width: 60rem)").matches;
for (const id of ["apart", "words"]) byId(id).addEventListener("change", paint);
byId("numbers").addEventListener("change", ({ target }) => byId("columns").classList.toggle("numbers-shown", target.checked));
byId("copy").addEventListener("click", async () => { await copy(byId("code-text").value, byId("code-text")); say("Code copied."); });
byId("ask-key").addEventListener("click", askKey);
byId("ask-register").addEventListener("click", () => registerDialog.open());
byId("key-later").addEventListener("click", () => byId("key").close());
byId("key").querySelector("form").addEventListener("submit", ({ target }) => {
  keys.api = target.elements.key.value;
  target.reset();
  connect();
});
byId("key").addEventListener("close", () => {
  byId("key").querySelector("form").reset();
  if (isConnected || keys.api !== null) return;
  byId("about").textContent = "This server wants an API key. Give it with the button “API key”.";
  byId("ask-key").focus();
});
window.addEventListener("hashchange", fromLink);
window.addEventListener("resize", valuesChanged);
connect();
