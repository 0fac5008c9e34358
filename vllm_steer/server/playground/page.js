"use strict";
// The page: the form, the columns, and what the server can do.

const byId = (id) => document.getElementById(id);
const form = byId("settings");
const DEFAULTS = { prompt: "My friend told me that her cat has died. What should I say to her?", op: "add", span: "response", mode: "chat", temperature: 0.7, seed: 0, max_tokens: 120, stop_above: "" };
const SLIDER_REACH = 50; // in the direction's own units, if the server does not know the layer's norm
const columns = [];
const running = new Map(); // column -> AbortController
let server = { layers: [], directions: [] };
let model = "";
let repaint = 0;
let lastAsked = ""; // the settings of the replies on the page, as text

const say = (text) => { byId("status").textContent = text; };

function settings() {
  const values = Object.fromEntries(new FormData(form));
  for (const name of NUMBERS) if (values[name] !== "") values[name] = Number(values[name]);
  return values;
}

const ownLayers = (name) => server.directions.filter((one) => one.name === name).map((one) => one.layer);

/** The layer at which a direction is read: the chosen one if it belongs there, else its own. */
function ownLayer({ direction, layer }) {
  const own = ownLayers(direction);
  return own.includes(layer) ? layer : own.find((one) => server.layers.includes(one)) ?? own[0];
}

function fill(select, options, wanted) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text ?? value, value)));
  if (options.some(([value]) => String(value) === String(wanted))) select.value = wanted;
}

function fillLayers(wanted) {
  const own = ownLayers(form.direction.value);
  const hooked = own.filter((layer) => server.layers.includes(layer));
  fill(form.layer, server.layers.map((layer) => [layer, own.includes(layer) ? `${layer}, its own` : layer]), wanted ?? hooked[0]);
  setReaches();
}

function setReaches() {
  const norm = server.residual_norms?.[form.layer.value];
  const bound = server.max_alpha_residual_norm && norm ? server.max_alpha_residual_norm * norm : Infinity;
  const limit = Math.min(server.max_alpha ?? Infinity, bound);
  for (const column of columns) column.setReach(norm ?? SLIDER_REACH, limit);
}

function addColumn(alpha) {
  const column = new Column(alpha, {
    onAlpha: (changed) => {
      share();
      if (!changed.hasRun || !byId("again").checked || !form.reportValidity()) return;
      // replies to other settings would stay next to this one
      run(JSON.stringify(settings()) === lastAsked ? [changed] : [...columns]);
    },
    onValues: () => { repaint ||= requestAnimationFrame(paint); },
    onCode: showCode,
    onRemove: (gone) => {
      running.get(gone)?.abort();
      columns.splice(columns.indexOf(gone), 1);
      gone.element.remove();
      share();
      paint();
      byId("add").focus();
    },
  });
  columns.push(column);
  byId("columns").append(column.element);
  setReaches();
  return column;
}

function paint() {
  repaint = 0;
  const scale = scaleOf(columns, byId("apart").checked);
  byId("legend").hidden = !scale;
  if (!scale) return;
  const { reach, unsteered } = scale;
  const apart = byId("apart").checked; // α shifts a whole reply; without the shift, differences between tokens show
  for (const column of columns) column.shade({ centre: apart ? meanOf(column.values) : scale.centre, reach });
  const centre = apart ? 0 : scale.centre;
  const asked = JSON.parse(lastAsked);
  byId("legend-text").textContent = `Shading: projection of each token's stream onto “${asked.direction}” at layer ${ownLayer(asked)}, `
    + `after steering. Centre: ${apart ? "each column's own mean" : unsteered ? "mean of the unsteered reply" : "zero"}.`;
  [byId("lowest").textContent, byId("centre").textContent, byId("highest").textContent] = [centre - reach, centre, centre + reach].map(shown);
}

async function run(chosen) {
  const asked = settings();
  lastAsked = JSON.stringify(asked);
  share();
  say(`Running ${chosen.length} ${chosen.length === 1 ? "column" : "columns"} …`);
  const outcomes = await Promise.allSettled(chosen.map(async (column) => {
    running.get(column)?.abort();
    const controller = new AbortController();
    running.set(column, controller);
    byId("stop").disabled = false;
    try {
      await column.run(asked, bodyOf(asked, column.alpha, model, ownLayer(asked)), controller.signal);
      return controller.signal.aborted;
    } finally {
      if (running.get(column) === controller) running.delete(column);
    }
  }));
  byId("stop").disabled = running.size === 0;
  if (running.size) return;
  const refused = outcomes.filter(({ reason }) => reason).map(({ reason }) => reason);
  if (refused.some(({ status }) => status === 401)) return askKey();
  const stopped = outcomes.some(({ value }) => value);
  say(refused.length ? `${refused.length} of ${chosen.length} failed.` : stopped ? "Stopped."
    : chosen.map((column) => `${column.heading.textContent}: ${column.summary}`).join("; ") + ".");
}

function share() {
  history.replaceState(null, "", `#${toFragment(settings(), columns.map(({ alpha }) => alpha))}`);
}

function fromLink() {
  const { settings: linked, alphas } = fromFragment(location.hash);
  for (const [name, value] of Object.entries({ ...DEFAULTS, ...linked })) if (form[name].tagName !== "SELECT" || ["op", "span", "mode"].includes(name)) form[name].value = value;
  fill(form.direction, [...new Set(server.directions.map(({ name }) => name))].sort().map((name) => [name]), linked.direction);
  fillLayers(linked.layer);
  for (const column of columns.splice(0)) { running.get(column)?.abort(); column.element.remove(); }
  const norm = server.residual_norms?.[form.layer.value];
  const strong = norm ? Number((0.2 * norm).toPrecision(2)) : 8;
  for (const alpha of alphas.length ? alphas : [0, strong]) addColumn(alpha);
  paint();
}

function showCode(column, language) {
  const asked = settings();
  const body = bodyOf(asked, column.alpha, model, ownLayer(asked));
  byId("code-title").textContent = `${column.heading.textContent}, as ${language === "curl" ? "curl" : "Python"}`;
  byId("code-text").value = (language === "curl" ? asCurl : asPython)(asked, body);
  byId("code").showModal();
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
  byId("key-why").textContent = apiKey === null
    ? "This server wants an API key. The page keeps it in memory only: reloading forgets it."
    : "The server refused that API key. Try another one.";
  byId("key").showModal();
}

async function connect() {
  try {
    server = await (await ask("/v1/steering")).json();
    const models = (await (await ask("/v1/models")).json()).data;
    model = (models.find(({ parent }) => !parent) ?? models[0]).id; // the others are steered already
  } catch (error) {
    byId("about").textContent = error.message;
    if (error.status === 401) askKey();
    return;
  }
  byId("about").textContent = `${model}, hooked at ${server.layers.length === 1 ? "layer" : "layers"} ${server.layers.join(", ")}. `
    + (server.directions.length ? "All columns share the settings below, the seed too; only α differs." : "No direction is registered yet, so nothing can be steered.");
  fromLink();
}

form.addEventListener("submit", (event) => { event.preventDefault(); run([...columns]); });
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
});
form.addEventListener("change", share);
form.direction.addEventListener("change", () => { fillLayers(); share(); });
form.layer.addEventListener("change", setReaches);
byId("stop").addEventListener("click", () => { for (const controller of running.values()) controller.abort(); });
byId("add").addEventListener("click", () => {
  const strongest = Math.max(...columns.map(({ alpha }) => alpha), 0);
  addColumn(columns.length ? -strongest || SLIDER_REACH / 5 : 0).number.focus();
  share();
});
byId("link").addEventListener("click", async () => {
  share();
  say(await copy(location.href) ? "Link copied. It holds the settings, not the key." : "Copy the page's address: it holds the settings.");
});
byId("apart").addEventListener("change", paint);
byId("numbers").addEventListener("change", ({ target }) => byId("columns").classList.toggle("numbers", target.checked));
byId("copy").addEventListener("click", async () => { await copy(byId("code-text").value, byId("code-text")); say("Code copied."); });
byId("key").querySelector("form").addEventListener("submit", ({ target }) => { apiKey = target.key.value; target.reset(); connect(); });
window.addEventListener("hashchange", fromLink);
connect();
