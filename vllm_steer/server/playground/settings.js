"use strict";
// The form: what all columns share.

const byId = (id) => document.getElementById(id);
const form = byId("settings");
const DEFAULTS = {
  prompt: "My friend told me that her cat has died. What should I say to her?", system: "", mode: "chat", temperature: 0.7, seed: 0,
  n: 1, max_tokens: 120, unit: "raw", stop_side: "above", stop_value: "", stop_patience: 1,
};
// selects of the page's own, and the begin of the sentence about a value that a link gives and they do not have
const CHOICES = { mode: "“Prompt is” has no choice", unit: "“Unit of α” has no choice", stop_side: "“when it is” has no choice" };
const JUDGED = ["measured", "stop_direction", ...Object.keys(CHOICES)];
const rows = []; // an EntryRow for each direction to steer with
let server = { layers: [], directions: [] }; // as /v1/steering says
let directions = new Directions([], []);
let model = "";

const say = (text) => { byId("status").textContent = text; };

function fieldValues() {
  const names = [...TEXTS, ...NUMBERS];
  return Object.fromEntries(names.map((name) => {
    const { value } = form.elements[name];
    return [name, NUMBERS.includes(name) && value !== "" ? Number(value) : value];
  }));
}

const entriesNow = () => (directions.names.length ? rows.map((row, index) => row.read(index)) : []);

/** Everything that the columns share. */
function settings() {
  const { stop_direction, stop_side: side, stop_value: value, stop_patience: patience, measured, unit, ...rest } = fieldValues();
  const entries = entriesNow();
  return {
    ...rest, entries,
    measured: measured || entries[0]?.direction,
    layer: entries[0]?.layer,
    stop: stop_direction ? { direction: stop_direction, side, value, patience } : null,
  };
}

/** The layer at which a name is read: that of the first entry if it belongs there, else its own. */
const readLayer = (name) => directions.own(name, rows[0]?.layer.value);

/** Fills the form from `fields` and `entries` of a link; what they leave out is as at first. */
function fillForm(fields, entries) {
  for (const [name, value] of Object.entries({ ...DEFAULTS, ...fields })) {
    if (Object.hasOwn(CHOICES, name)) choose(form.elements[name], value, CHOICES[name]);
    else if (!JUDGED.includes(name)) form.elements[name].value = value;
  }
  const names = directions.names.map((name) => [name]);
  fill(form.elements.measured, [["", "as steered"], ...names], fields.measured, "direction");
  fill(form.elements.stop_direction, [["", "nothing"], ...names], fields.stop_direction, "direction");
  byId("system").open = form.elements.system.value !== "";
  for (const row of rows.splice(0)) row.element.remove();
  for (const entry of entries) addRow(entry);
}

function addRow(entry) {
  const row = new EntryRow({
    onChange: () => settingsChanged(),
    onRemove: (gone) => {
      rows.splice(rows.indexOf(gone), 1);
      gone.element.remove();
      byId("add-entry").focus();
      settingsChanged();
    },
  });
  rows.push(row);
  byId("entries").append(row.element);
  row.fill(entry, server, directions);
  return row;
}

/** Offers what the server has now, and keeps what is chosen. */
function refill() {
  const entries = entriesNow();
  const fields = fieldValues();
  fillForm(fields, entries.length ? entries : [{}]);
}

/** Labels, bounds and complaints, after any change of the form. */
function configureForm() {
  const inNorms = form.elements.unit.value === "norms";
  rows.forEach((row, index) => row.configure(index, rows.length, inNorms));
  for (const name of JUDGED) judgeChoice(form.elements[name]);
  form.elements.stop_value.required = form.elements.stop_direction.value !== "";
  const isChat = form.elements.mode.value === "chat";
  for (const id of ["system", "next-turn", "restart"]) byId(id).hidden = !isChat;
  byId("entries").hidden = directions.names.length === 0;
  const layers = [...new Set(rows.map((row) => row.layer.value))];
  const norms = layers.map((layer) => [layer, server.residual_norms?.[layer]]);
  const known = norms.filter(([, norm]) => norm !== undefined);
  form.elements.unit.querySelector("[value=norms]").disabled = known.length === 0;
  byId("more-told").textContent = form.elements.mode.value === "chat" ? summaryOf(settings()) : `plain text, ${summaryOf(settings())}`;
  byId("unit-told").textContent = known.length
    ? known.map(([layer, norm]) => `A norm of layer ${layer} is ${written(norm)}.`).join(" ")
    : "The server does not know the layer's mean residual norm (its setting residual_norms).";
}

const setOf = (value) => (value === "" ? "?" : value); // of a field that is still empty

/** The folded settings, in few words. */
const summaryOf = (asked) => `temperature ${setOf(asked.temperature)}, seed ${setOf(asked.seed)}, ${counted(setOf(samplesOf(asked)), "sample")}, `
  + `${counted(setOf(asked.max_tokens), "token")}, ${asked.stop ? `stop by ${asked.stop.direction} ${asked.stop.side} ${setOf(asked.stop.value)}` : "no stop"}`;

/** What is missing or wrong in the form, in words; the browser marks the fields. */
const complaints = () => [...new Set([
  ...rows.map((row, index) => row.judge(index)),
  ...JUDGED.map((name) => judgeChoice(form.elements[name])),
])].filter(Boolean);
