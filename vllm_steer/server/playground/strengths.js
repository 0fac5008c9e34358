"use strict";
// The operations, the bounds on their numbers, and α in multiples of a layer's mean residual norm.

const OPERATIONS = {
  add: { label: "add α·d", fields: ["alpha"], inNorms: true },
  ablate: { label: "ablate: remove α times the component", fields: ["alpha"] },
  set: { label: "set the projection to α", fields: ["alpha"], inNorms: true },
  scale: { label: "scale the projection by α", fields: ["alpha"] },
  clamp: { label: "clamp the projection, low to high", fields: ["low", "high"], inNorms: true },
};
// what a link names and the page does not have; it is shown as missing and never sent
const UNKNOWN_OPERATION = { label: "an unknown operation", fields: ["alpha"], inNorms: true };
const operationOf = (op) => OPERATIONS[op] ?? UNKNOWN_OPERATION;
const FIELD_NAMES = { alpha: "α", low: "low", high: "high" };
const PLAIN_ALPHA = 8; // where the layer's norm is not known
const PLAIN_REACH = 50;

const shown = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3)).replace("-", "−");
const neat = (value) => Number(value.toPrecision(6));
const signed = (value) => (value > 0 ? `+${neat(value)}` : String(neat(value)).replace("-", "−"));
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const written = (value) => String(neat(value)).replace("-", "−");

/**
 * What one entry's numbers may be on this server.
 *
 * `norm` is the layer's mean residual norm, `perNorm` the number that moves a token by one such norm; both are
 * undefined where the server does not know it. `least` and `most` bound each number; `isOpen` excludes `least`.
 * `reach` is the slider's end, `usual` a first value to try, `why` the reason for the bounds.
 */
function boundsOf({ op, layer }, length, server) {
  const norm = server.residual_norms?.[layer];
  const perNorm = norm === undefined || !operationOf(op).inNorms ? undefined : norm / length;
  if (op === "ablate") {
    return { norm, least: 0, most: 2, isOpen: true, reach: 2, usual: 1, why: "1 removes all of the component, 2 mirrors it" };
  }
  const multiple = server.max_alpha_residual_norm ?? Infinity;
  const most = server.max_alpha ?? Infinity;
  if (op === "scale") {
    const far = Math.min(most / (norm ?? 1), multiple / length);
    return { norm, least: 1 - far, most: 1 + far, reach: Math.min(4, 1 + far), usual: Math.min(2, 1 + far),
      why: far < Infinity ? "the server bounds |α − 1|" : "the server sets no bound" };
  }
  const byNorm = norm === undefined ? Infinity : multiple * norm / length;
  const far = Math.min(most, byNorm);
  const why = far === Infinity ? "the server sets no bound"
    : byNorm < most ? `${written(multiple)} residual ${multiple === 1 ? "norm" : "norms"} of layer ${layer}, over all directions there`
      : "the server's max_alpha, over all directions at the layer";
  const usual = perNorm === undefined ? PLAIN_ALPHA : neat(0.2 * perNorm);
  return { norm, perNorm, least: -far, most: far, reach: Math.min(perNorm ?? PLAIN_REACH, far), usual: Math.min(usual, far), why };
}

/** The bounds in words, in norms if `inNorms`. */
function allowed({ least, most, isOpen, perNorm, why }, inNorms) {
  const unit = inNorms && perNorm ? perNorm : 1;
  const range = Number.isFinite(most) ? `${isOpen ? "above " : ""}${written(least / unit)} to ${written(most / unit)}${unit === 1 ? "" : " norms"}` : "any number";
  return `${range} (${why})`;
}

/** What is wrong with a number that was typed, or nothing. */
function mistakeIn(value, bounds, inNorms, isOptional) {
  if (Number.isNaN(value)) return isOptional ? "" : `No number. Allowed: ${allowed(bounds, inNorms)}.`;
  // α in norms is converted, which can miss the bound itself by rounding
  const slack = 1e-9 * Math.abs(bounds.most);
  const fits = value <= bounds.most + slack && (bounds.isOpen ? value > bounds.least : value >= bounds.least - slack);
  const unit = inNorms && bounds.perNorm ? bounds.perNorm : 1;
  return fits ? "" : `${written(value / unit)} is not allowed. Allowed: ${allowed(bounds, inNorms)}.`;
}

/** A value for another column that none of `taken` has: near those that were tried, on both sides, within bounds. */
function nextValue(op, taken, bounds) {
  const strongest = Math.max(...taken.map((value) => Math.abs(value)), 0) || bounds.usual;
  const tries = taken.length === 0 ? [bounds.usual]
    : op === "ablate" ? [1, 0.5, 2, 1.5, 0.25, 0.75, 1.25, 1.75]
      : op === "scale" ? [2, 0, 0.5, -1, 3, 1.5, -2, 4, 5, 6]
        : [1, -1, 0.5, -0.5, 1.5, -1.5, 2, -2, 0.25, -0.25, 3, -3, 0.75, -0.75].map((part) => part * strongest);
  const nothing = op === "scale" ? 1 : 0; // what changes nothing
  const unused = (value) => value !== nothing && taken.every((one) => Math.abs(one - value) > 1e-6 * strongest) && !mistakeIn(value, bounds);
  const found = tries.map(neat).find(unused);
  if (found !== undefined) return found;
  // all of these are taken: halve the widest gap between the values that are
  const sorted = [...taken, bounds.usual].sort((a, b) => a - b);
  const gaps = sorted.slice(1).map((value, index) => [value - sorted[index], (value + sorted[index]) / 2])
    .filter(([, middle]) => neat(middle) !== nothing);
  return neat(gaps.sort((a, b) => b[0] - a[0])[0]?.[1] ?? bounds.usual / 2);
}
