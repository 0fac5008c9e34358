"use strict";
// The settings in the URL's fragment, which browsers do not send to servers. The prompt is in it; keys and answers are not.

const TEXTS = ["prompt", "system", "mode", "measured", "unit", "stop_direction", "stop_side"];
const NUMBERS = ["temperature", "seed", "n", "max_tokens", "stop_value", "stop_patience"];
const FIRST = ["direction", "layer", "op", "span"]; // of the first entry; the others are in `also`
const MAY_BE_EMPTY = ["prompt", "system", "measured", "stop_direction"]; // texts
const UNSET = ["system", "measured", "stop_direction", "stop_value"]; // left out where they are empty
const EDGE = "1"; // `v` is first and `end` last, so that a link that was cut shows it
const LINK_NAMES = [...TEXTS, ...NUMBERS, ...FIRST, "also", "columns", "alphas"];
const SPEC_FIELDS = { plain: [], alias: ["alias"], steered: ["direction", "alpha", "low", "high"] };

/** `fields` are the form's values by name, `entries` the list of entries, `specs` those of the columns. */
function toFragment(fields, entries, specs) {
  const query = new URLSearchParams({ v: EDGE });
  for (const name of [...TEXTS, ...NUMBERS]) if (fields[name] !== "" || !UNSET.includes(name)) query.set(name, fields[name]);
  const [first, ...others] = entries;
  for (const name of FIRST) if (first?.[name] !== undefined) query.set(name, first[name]);
  if (others.length) query.set("also", JSON.stringify(others));
  query.set("columns", JSON.stringify(specs));
  query.set("end", EDGE);
  return query.toString();
}

/**
 * The reverse. `alphas=0,8` is short for an unsteered column and one with α 8.
 *
 * `unread` has a sentence for everything that could not be read. Nothing takes the place of that: a number is left
 * empty, a column or a direction left out. `specs` is undefined where the link speaks of no columns.
 */
function fromFragment(fragment) {
  const query = new URLSearchParams(fragment.replace(/^#/, ""));
  const unread = [];
  const isCut = cutIn(query, unread);
  unread.push(...strangersIn(query));
  const fields = {};
  for (const name of TEXTS) if (hasText(query, name, unread)) fields[name] = query.get(name);
  for (const name of NUMBERS) {
    if (!query.has(name)) continue;
    const value = numberIn(query.get(name));
    fields[name] = value ?? "";
    if (value === undefined && query.get(name) !== "") unread.push(`${name} is “${query.get(name)}”, which is no number; type one.`);
  }
  const first = {};
  for (const name of FIRST) if (hasText(query, name, unread)) first[name] = query.get(name);
  const also = readableIn(query, "also", isEntry, "direction", unread);
  const specs = readableIn(query, "columns", isSpec, "column", unread);
  const alphas = (query.get("alphas") ?? "").split(",").filter((text) => text.trim());
  for (const text of alphas) {
    const alpha = numberIn(text.trim());
    if (alpha === undefined) unread.push(`alphas has “${text.trim()}”, which is no number; its column is left out.`);
    else specs.push(alpha === 0 ? { kind: "plain" } : { kind: "steered", alpha });
  }
  if (specs.length > MOST_COLUMNS) unread.push(`It has ${specs.length} columns; the page shows the first ${MOST_COLUMNS}, the most that it can tell apart.`);
  const isAboutColumns = isCut || query.has("columns") || query.has("alphas");
  return { fields, entries: [first, ...also], specs: isAboutColumns ? specs.slice(0, MOST_COLUMNS) : undefined, unread };
}

/** Whether the link has lost its end, which is then said; what may be left of the end itself is taken away. */
function cutIn(query, unread) {
  if (!query.has("v") || query.get("end") === query.get("v")) return false;
  const last = [...query.keys()].at(-1);
  if (last !== "v" && !LINK_NAMES.includes(last)) query.delete(last); // a part of a name
  const lost = ["columns", ...(query.has("op") ? [] : ["directions"])].filter((name) => !query.has(name));
  unread.push(`It was cut short, at “${last}”. Copy it again where it comes from.`
    + (lost.length ? ` It has lost its ${lost.join(" and ")}; other settings behind the cut are those of a new page.` : ""));
  return true;
}

/** Sentences about names that no link of this page has, and about names that come twice. */
function strangersIn(query) {
  const names = [...query.keys()];
  return [...new Set(names)].flatMap((name) => {
    if (![...LINK_NAMES, "v", "end"].includes(name)) return [`“${name}” is none of the names that a link may have: ${LINK_NAMES.join(", ")}.`];
    return query.getAll(name).length > 1 ? [`“${name}” comes more than once; the first one is shown.`] : [];
  });
}

function hasText(query, name, unread) {
  if (!query.has(name)) return false;
  const isFine = query.get(name) !== "" || MAY_BE_EMPTY.includes(name);
  if (!isFine) unread.push(`${name} is empty; choose one.`);
  return isFine;
}

/** A decimal number, or undefined. */
function numberIn(text) {
  const value = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text) ? Number(text) : NaN;
  return Number.isFinite(value) ? value : undefined;
}

/** The objects of a JSON list that are as they should be; of each other one, a sentence joins `unread`. */
function readableIn(query, name, isFine, what, unread) {
  if (!query.has(name)) return [];
  let list;
  try {
    list = JSON.parse(query.get(name));
  } catch { /* no JSON, or a part of it: said below */ }
  if (!Array.isArray(list)) {
    unread.push(`“${name}” is not a complete JSON list, so none of its ${what}s are shown.`);
    return [];
  }
  return list.filter((one, index) => {
    const reads = one !== null && typeof one === "object" && isFine(one);
    if (!reads) unread.push(`“${name}” has no ${what} in place ${index + 1}, but ${JSON.stringify(one)}; it is left out.`);
    return reads;
  });
}

const areNumbers = (one) => ["alpha", "low", "high"].every((name) => one[name] === undefined || Number.isFinite(one[name]));

const isEntry = (one) => typeof one.direction === "string" && typeof (one.op ?? "add") === "string" && areNumbers(one);

function isSpec(one) {
  const allowed = Object.hasOwn(SPEC_FIELDS, one.kind) ? SPEC_FIELDS[one.kind] : undefined;
  if (!allowed || !Object.keys(one).every((name) => name === "kind" || allowed.includes(name)) || !areNumbers(one)) return false;
  if (one.kind === "alias") return typeof one.alias === "string";
  return one.kind === "plain" || (typeof (one.direction ?? "") === "string" && ["alpha", "low", "high"].some((name) => one[name] !== undefined));
}
