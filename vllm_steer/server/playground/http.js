"use strict";
// Requests to the page's own server, and the two keys: kept in memory only, never stored and in no link.

const ROOT = location.pathname.replace(/(\/v1)?\/steering\/playground\/?$/, "");
const keys = { api: null, admin: null };

/** The server said no, or nothing: `status` is then 0. */
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const unreachable = () => new Refused(0, "The server cannot be reached. Check that it still runs, then try again.");

const silent = () => new Refused(0, "The server has stopped answering. Check that it still runs, then run again.");

function headersOf(given) {
  try {
    const headers = new Headers(given);
    if (keys.api !== null) headers.set("Authorization", `Bearer ${keys.api}`);
    return headers;
  } catch {
    throw new Refused(401, "A key has characters that cannot be sent; keys are letters, digits and signs of ASCII.");
  }
}

async function ask(path, options = {}) {
  const headers = headersOf(options.headers);
  let reply;
  try {
    reply = await fetch(ROOT + path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (reply.ok) return reply;
  let message = `${reply.status} ${reply.statusText}`;
  try {
    const { error } = await reply.json();
    message = error.message ?? String(error);
  } catch { /* no JSON: the status says it */ }
  throw new Refused(reply.status, message);
}

/** As `ask`, for questions that a living server answers at once; refuses after `limit` milliseconds. */
async function askSoon(path, limit) {
  const late = new AbortController();
  const timer = setTimeout(() => late.abort(), limit);
  try {
    return await ask(path, { signal: late.signal });
  } catch (error) {
    throw late.signal.aborted ? silent() : error;
  } finally {
    clearTimeout(timer);
  }
}

const askJson = async (path) => (await ask(path)).json();

/** One vector of float32 little-endian numbers, from the safetensors file of one direction. */
async function vectorOf(name, layer) {
  const reply = await ask(`/v1/steering/directions/${encodeURIComponent(name)}?layer=${layer}`);
  const file = await reply.arrayBuffer();
  const { header, start } = safetensorsIn(file);
  const [, { data_offsets: [from, to] }] = Object.entries(header).find(([key]) => key !== "__metadata__");
  return new Float32Array(file.slice(start + from, start + to));
}

/** Registers the bytes of a direction; `fields` are those of the query. Resolves to the directions as listed. */
async function putDirection(name, bytes, fields) {
  const query = new URLSearchParams(Object.entries(fields).filter(([, value]) => value !== "" && value !== undefined));
  const reply = await ask(`/v1/steering/directions/${encodeURIComponent(name)}?${query}`, {
    method: "PUT", headers: { "X-Admin-Key": keys.admin ?? "" }, body: bytes,
  });
  return (await reply.json()).directions;
}

async function deleteDirection(name) {
  await ask(`/v1/steering/directions/${encodeURIComponent(name)}`, { method: "DELETE", headers: { "X-Admin-Key": keys.admin ?? "" } });
}
