"use strict";
// The body of one column's request.

const pathOf = ({ mode }) => (mode === "chat" ? "/v1/chat/completions" : "/v1/completions");

/** What a column's spec makes of the first entry; of a control it has another direction. */
function steeringOf({ entries }, spec) {
  const [first, ...others] = entries;
  const { direction, layer, op, span } = first;
  const one = { direction: spec.direction ?? direction, layer, ...strengthOf(op, spec), span };
  return [one, ...others.map((other) => ({ direction: other.direction, layer: other.layer, ...strengthOf(other.op, other), span: other.span }))];
}

function strengthOf(op, numbers) {
  const told = Object.fromEntries(operationOf(op).fields.filter((name) => Number.isFinite(numbers[name])).map((name) => [name, numbers[name]]));
  return op === "add" ? told : { ...told, op };
}

/**
 * The body of a column's request.
 *
 * `spec` is the column: {kind: "plain" | "steered" | "alias", …}; `messages` are those of its earlier turns; `model` is
 * the server's own model; `own` says at which layer a direction of a name is read.
 */
function bodyOf(settings, spec, messages, model, own) {
  const { system, prompt, temperature, seed, n, max_tokens, measured, stop } = settings;
  const asked = settings.mode === "chat"
    ? { messages: [...(system.trim() ? [{ role: "system", content: system }] : []), ...messages, { role: "user", content: prompt }] }
    : { prompt };
  const body = { model: spec.kind === "alias" ? spec.alias : model, ...asked, max_tokens, temperature, seed };
  if (samplesOf(settings) > 1) body.n = n;
  // an alias brings its own steering; an empty list turns the server's default steering off
  if (spec.kind !== "alias") body.steering = spec.kind === "plain" ? [] : steeringOf(settings, spec);
  if (!measured) return body;
  body.readout = { layers: [own(measured)], span: "generated", project: [measured], trace: [measured] };
  if (stop) {
    const { direction, side, value, patience } = stop;
    body.readout.stop = { direction, [side]: value, layer: own(direction), ...(patience > 1 ? { patience } : {}) };
  }
  return body;
}

/** How many samples are asked for; at temperature 0 all would be the same, and vLLM refuses more than one. */
const samplesOf = ({ n, temperature }) => (temperature > 0 ? n : 1);
