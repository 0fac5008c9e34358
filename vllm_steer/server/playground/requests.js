"use strict";
// Requests and replies of the page, independent of the page itself.

const ROOT = location.pathname.replace(/(\/v1)?\/steering\/playground\/?$/, "");
let apiKey = null; // in memory only: neither stored nor part of a link

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey !== null) headers.Authorization = `Bearer ${apiKey}`;
  const reply = await fetch(ROOT + path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (reply.ok) return reply;
  let message = `${reply.status} ${reply.statusText}`;
  try {
    const { error } = await reply.json();
    message = error.message ?? String(error);
  } catch { /* no JSON: the status says it */ }
  throw new Refused(reply.status, message);
}

/** What a column's α does; α 0 is the reply without steering, whatever the operation. */
function entryOf({ direction, layer, span, op }, alpha) {
  const entry = { direction, layer, alpha, span };
  if (op === "add" || alpha === 0) return entry;
  const { alpha: _, ...rest } = entry;
  if (op === "least" || op === "most") return { ...rest, op: "clamp", [op === "least" ? "low" : "high"]: alpha };
  return { ...entry, op };
}

/** The body of one column's request; `own` is the layer that the direction belongs to, where it is traced. */
function bodyOf(settings, alpha, model, own) {
  const { direction, temperature, seed, max_tokens } = settings;
  const asked = settings.mode === "chat"
    ? { messages: [{ role: "user", content: settings.prompt }] }
    : { prompt: settings.prompt };
  const body = { model, ...asked, max_tokens, temperature, seed };
  if (!direction) return body;
  return {
    ...body,
    steering: [entryOf(settings, alpha)],
    readout: {
      layers: [own], span: "generated", project: [direction], trace: [direction],
      ...(settings.stop_above === "" ? {} : { stop: { direction, above: settings.stop_above, layer: own } }),
    },
  };
}

const pathOf = (settings) => (settings.mode === "chat" ? "/v1/chat/completions" : "/v1/completions");

/** Streams one reply; yields {text, tokens, trace: {start, values} | undefined, readout, finish}. */
async function* stream(settings, body, signal) {
  const reply = await ask(pathOf(settings), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    // token ids tell how many tokens a chunk brings: under load it can be several, or one that has no text yet
    body: JSON.stringify({ ...body, stream: true, return_token_ids: true }),
    signal,
  });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const event = line.slice(5).trim();
      if (event === "[DONE]") return;
      const chunk = JSON.parse(event);
      if (chunk.error) throw new Refused(chunk.error.code, chunk.error.message);
      for (const choice of chunk.choices) {
        const delta = choice.delta ?? choice;
        const text = delta.content ?? delta.text ?? delta.reasoning ?? "";
        yield {
          text,
          tokens: choice.token_ids?.length ?? (text ? 1 : 0),
          trace: choice.trace?.[settings.direction],
          readout: choice.readout,
          finish: choice.finish_reason,
        };
      }
    }
  }
}

// The settings are in the URL's fragment, which browsers do not send to servers.
const TEXTS = ["prompt", "direction", "op", "span", "mode"];
const NUMBERS = ["layer", "temperature", "seed", "max_tokens", "stop_above"]; // an empty field stays ""

function toFragment(settings, alphas) {
  const fields = new URLSearchParams();
  for (const name of [...TEXTS, ...NUMBERS]) if (settings[name] !== "") fields.set(name, settings[name]);
  fields.set("alphas", alphas.join(","));
  return fields.toString();
}

function fromFragment(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""));
  const settings = {};
  for (const name of TEXTS) if (fields.has(name)) settings[name] = fields.get(name);
  for (const name of NUMBERS) {
    const value = Number(fields.get(name));
    if (fields.get(name) && Number.isFinite(value)) settings[name] = value;
  }
  const alphas = (fields.get("alphas") ?? "").split(",").filter((text) => text.trim()).map(Number).filter(Number.isFinite);
  return { settings, alphas };
}

function asCurl(settings, body) {
  const quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  const key = apiKey === null ? "" : '  -H "Authorization: Bearer $API_KEY" \\\n';
  return `curl ${location.origin}${ROOT}${pathOf(settings)} \\\n${key}  -H 'Content-Type: application/json' \\\n  -d '${quoted}'\n`;
}

function asPython(settings, body) {
  const { steering, readout, ...standard } = body;
  const literal = (value) => { // the output of JSON.stringify as a Python literal
    if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
    if (value !== null && typeof value === "object") {
      return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`).join(", ")}}`;
    }
    return { true: "True", false: "False", null: "None" }[JSON.stringify(value)] ?? JSON.stringify(value);
  };
  const call = settings.mode === "chat" ? "client.chat.completions.create" : "client.completions.create";
  const text = settings.mode === "chat" ? "reply.choices[0].message.content" : "reply.choices[0].text";
  const lines = Object.entries(standard).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  if (steering) {
    lines.push(`    extra_body={\n        "steering": ${literal(steering)},\n        "readout": ${literal(readout)},\n    },\n`);
  }
  const shown = steering ? `print(${text}, reply.choices[0].readout)` : `print(${text})`;
  return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}${ROOT}/v1", `
    + `api_key=os.environ.get("API_KEY", "none"))\nreply = ${call}(\n${lines.join("")})\n${shown}\n`;
}
