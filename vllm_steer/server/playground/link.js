"use strict";
// The settings in the URL's fragment, which browsers do not send to servers. No key and no conversation is in it.

const TEXTS = ["prompt", "system", "mode", "measured", "unit", "stop_direction", "stop_side"];
const NUMBERS = ["temperature", "seed", "n", "max_tokens", "stop_value", "stop_patience"];
const FIRST = ["direction", "layer", "op", "span"]; // of the first entry; the others are in `also`

/** `fields` are the form's values by name, `entries` the list of entries, `specs` those of the columns. */
function toFragment(fields, entries, specs) {
  const query = new URLSearchParams();
  for (const name of [...TEXTS, ...NUMBERS]) if (fields[name] !== "") query.set(name, fields[name]);
  const [first, ...others] = entries;
  for (const name of FIRST) if (first?.[name] !== undefined) query.set(name, first[name]);
  if (others.length) query.set("also", JSON.stringify(others));
  query.set("columns", JSON.stringify(specs));
  return query.toString();
}

/** The reverse. `alphas=0,8` is short for an unsteered column and one with α 8. */
function fromFragment(fragment) {
  const query = new URLSearchParams(fragment.replace(/^#/, ""));
  const fields = {};
  for (const name of TEXTS) if (query.has(name)) fields[name] = query.get(name);
  for (const name of NUMBERS) {
    const value = Number(query.get(name));
    if (query.get(name) && Number.isFinite(value)) fields[name] = value;
  }
  const first = {};
  for (const name of FIRST) if (query.has(name)) first[name] = query.get(name);
  if (!Object.hasOwn(OPERATIONS, first.op ?? "add")) delete first.op;
  const also = listIn(query.get("also")).filter((one) => typeof one.direction === "string" && Object.hasOwn(OPERATIONS, one.op));
  const specs = listIn(query.get("columns")).filter(isSpec);
  const alphas = (query.get("alphas") ?? "").split(",").filter((text) => text.trim()).map(Number).filter(Number.isFinite);
  for (const alpha of alphas) specs.push(alpha === 0 ? { kind: "plain" } : { kind: "steered", alpha });
  return { fields, entries: [first, ...also], specs };
}

const isSpec = (one) => one.kind === "plain" || (one.kind === "alias" && typeof one.alias === "string")
  || (one.kind === "steered" && ["alpha", "low", "high"].some((name) => Number.isFinite(one[name])));

function listIn(text) {
  try {
    const list = JSON.parse(text ?? "[]");
    return Array.isArray(list) ? list.filter((one) => one !== null && typeof one === "object") : [];
  } catch { // a link that was cut short
    return [];
  }
}
