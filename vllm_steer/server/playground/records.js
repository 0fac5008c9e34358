"use strict";
// Everything that was asked and answered since the page was opened, for saving as JSON.

const records = [];

/** What an answer depends on: the request, and what its directions and its alias are at the server. */
function askedOf(column, path, body, server) {
  const named = new Set([...(body.steering ?? []), ...(server.aliases?.[column.alias] ?? [])].map(({ direction }) => direction));
  for (const name of body.readout?.project ?? []) named.add(name);
  if (body.readout?.stop) named.add(body.readout.stop.direction);
  return {
    path, request: body, directions: server.directions.filter(({ name }) => named.has(name)),
    ...(column.kind === "alias" ? { alias_steering: server.aliases?.[column.alias] ?? null } : {}),
  };
}

/** Notes a request that is about to be sent; call `answered` on it at its end. */
function recordOf(column, asked, server) {
  const record = {
    asked_at: new Date().toISOString(), column: column.name, spec: column.spec, ...asked,
    vllm_steer: server.version ?? null, vllm: server.vllm ?? null, replies: null, outcome: "running",
  };
  records.push(record);
  return record;
}

function answered(record, column, outcome) {
  Object.assign(record, { answered_at: new Date().toISOString(), outcome, replies: column.samples.map((sample) => sample.toJson()) });
}

function exported(server) {
  return { format: "vllm-steer playground", format_version: 1, saved_at: new Date().toISOString(), server, runs: records };
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const fileName = (ending) => `playground-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.${ending}`;
