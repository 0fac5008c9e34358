"use strict";
// Running the columns: the requests, their records, and what the page says of them.

const columns = [];
const running = new Map(); // column -> AbortController
let lastAsked = ""; // the settings of the answers on the page, as text
let repaint = 0;

/** Whether what all columns share may be sent; otherwise says what is wrong and moves there. */
function isReady() {
  if (rows.some((row, index) => index > 0 && row.numbers.mistake)) {
    const row = rows.find((one, index) => index > 0 && one.numbers.mistake);
    say(row.numbers.mistake);
    row.numbers.focus();
    return false;
  }
  if (!form.reportValidity()) {
    const field = form.querySelector(":is(input, select, textarea):invalid");
    say(complaints()[0] ?? `${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`);
    return false;
  }
  return true;
}

/** What cannot be sent of the settings, as a reason not to show a request; nothing where all can. */
function unsendable() {
  if (form.elements.prompt.value === "") return "Write a prompt first.";
  return form.matches(":invalid") || rows.some((row, index) => index > 0 && row.numbers.mistake) ? "Correct the marked setting first." : "";
}

/** Brings up to date what the columns say of the settings: which answers are of others, and whether there is a request. */
function judgeColumns() {
  const why = unsendable();
  for (const column of columns) column.offerCode(why || column.mistake);
  markStale(settings());
}

async function run(chosen) {
  if (!chosen.length) return say("There is no column. Add one.");
  if (!isReady()) return undefined;
  const wrong = chosen.filter(({ mistake }) => mistake);
  const leftOut = wrong.map(({ name, mistake }) => `Column “${name}” did not run: ${mistake}`).join(" ");
  for (const column of wrong) {
    running.get(column)?.abort();
    column.leaveOut();
  }
  wrong[0]?.strength.focus();
  chosen = chosen.filter((column) => !wrong.includes(column));
  if (!chosen.length) {
    paint();
    turnChanged();
    return say(leftOut);
  }
  const asked = settings();
  lastAsked = JSON.stringify(asked);
  share();
  say(`Running ${counted(chosen.length, "column")} … ${leftOut}`);
  const fresh = refreshServer(); // the directions as they are now, for the records
  const outcomes = await Promise.allSettled(chosen.map((column) => runOne(column, asked, fresh)));
  byId("stop").disabled = running.size === 0;
  turnChanged();
  if (running.size) return undefined; // another run says how it ends
  const failed = outcomes.filter(({ reason }) => reason).map(({ reason }) => reason);
  if (failed.some(({ status }) => status === 401)) return askKey();
  const stopped = outcomes.some(({ value }) => value);
  const told = failed.length ? `${failed.length} of ${chosen.length} failed: ${failed[0].message}` : stopped ? "Stopped." : endOf(chosen);
  return say(`${told} ${leftOut}`.trim());
}

/** What the status says of columns that are complete: of two answers what they are, of more only how many. */
function endOf(chosen) {
  const each = samplesOf(chosen[0].asked);
  if (chosen.length * each <= 2) return `${chosen.map((column) => `${column.name}: ${column.summary}`).join("; ")}.`;
  const which = chosen.length === 1 ? `${chosen[0].name} is complete` : `${chosen.length === 2 ? "Both" : `All ${chosen.length}`} columns are complete`;
  return `${which}${each > 1 ? `, with ${each} samples${chosen.length > 1 ? " each" : ""}` : ""}.`;
}

/** Runs one column; resolves to whether the user stopped it. */
async function runOne(column, asked, fresh) {
  running.get(column)?.abort();
  const controller = new AbortController();
  running.set(column, controller);
  byId("stop").disabled = false;
  let record;
  let outcome = "complete";
  try {
    await fresh;
    if (controller.signal.aborted) return true;
    const [path, body] = [pathOf(asked), requestOf(column, asked)];
    const depends = askedOf(column, path, body, server);
    record = recordOf(column, depends, server);
    const isStopped = await column.run({ asked, name: column.name, key: JSON.stringify(depends) }, path, body, controller.signal);
    if (isStopped) outcome = "stopped by the user";
    return isStopped;
  } catch (error) {
    outcome = error.message;
    if (!record) { column.clear(); column.fail(error.message); }
    throw error;
  } finally {
    if (record) answered(record, column, outcome);
    if (running.get(column) === controller) running.delete(column);
  }
}

const requestOf = (column, asked) => bodyOf(asked, column.spec, column.messages, model, readLayer);

async function refreshServer() {
  server = { ...(await (await askSoon("/v1/steering", SILENT_MS)).json()), vllm: server.vllm };
  directions = new Directions(server.directions, server.layers);
}

function stopAll() {
  for (const controller of running.values()) controller.abort();
}

/** Repaints shading, chart and differences at the next frame. */
function valuesChanged() {
  repaint ||= requestAnimationFrame(paint);
}

function paint() {
  repaint = 0;
  const asked = lastAsked ? JSON.parse(lastAsked) : settings();
  const what = `projection of each token's stream onto “${asked.measured}” at layer ${directions.own(asked.measured, asked.layer)}, after steering`;
  shadeAll(columns, byId("apart").checked, what);
  drawChart(columns, what[0].toUpperCase() + what.slice(1));
  const plain = byId("words").checked ? columns.find((column) => column.isPlain) : undefined;
  for (const column of columns) {
    column.samples.forEach((sample, index) => {
      const other = plain?.samples[index] ?? plain?.samples[0];
      sample.compare(column !== plain && other?.isDone ? other.text : undefined);
    });
  }
}
