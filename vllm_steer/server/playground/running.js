"use strict";
// Running the columns: the requests, their records, and what the page says of them.

const columns = [];
const running = new Map(); // column -> AbortController
let lastAsked = ""; // the settings of the answers on the page, as text
let repaint = 0;

/** Whether everything may be sent; otherwise says what is wrong and moves there. */
function isReady(chosen) {
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
  const wrong = chosen.find(({ mistake }) => mistake);
  if (!wrong) return true;
  say(`Column “${wrong.name}”: ${wrong.mistake}`);
  wrong.strength.focus();
  return false;
}

async function run(chosen) {
  if (!chosen.length) return say("There is no column. Add one.");
  if (!isReady(chosen)) return undefined;
  const asked = settings();
  lastAsked = JSON.stringify(asked);
  share();
  say(`Running ${chosen.length} ${chosen.length === 1 ? "column" : "columns"} …`);
  const fresh = refreshServer(); // the directions as they are now, for the records
  const outcomes = await Promise.allSettled(chosen.map((column) => runOne(column, asked, fresh)));
  byId("stop").disabled = running.size === 0;
  turnChanged();
  if (running.size) return undefined; // another run says how it ends
  const failed = outcomes.filter(({ reason }) => reason).map(({ reason }) => reason);
  if (failed.some(({ status }) => status === 401)) return askKey();
  const stopped = outcomes.some(({ value }) => value);
  return say(failed.length ? `${failed.length} of ${chosen.length} failed: ${failed[0].message}` : stopped ? "Stopped."
    : chosen.length > 2 ? `All ${chosen.length} columns are complete.`
      : chosen.map((column) => `${column.name}: ${column.summary}`).join("; ") + ".");
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
    record = recordOf(column, path, body, server);
    const isStopped = await column.run(asked, path, body, controller.signal);
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
