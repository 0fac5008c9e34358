"use strict";
// The words by which two texts differ.

const MOST_CELLS = 4_000_000; // beyond that, two long texts count as different between their common ends

/**
 * [kind, text] pieces that turn `from` into `to`; the kinds are same, added and removed. Words are compared without the
 * space behind them; what is the same is written as in `to`.
 */
function wordDiff(from, to) {
  const [a, b] = [from, to].map((text) => text.match(/^\s+|\S+\s*/g) ?? []);
  let start = 0;
  while (start < Math.min(a.length, b.length) && isSame(a[start], b[start])) start += 1;
  let end = 0;
  while (end < Math.min(a.length, b.length) - start && isSame(a[a.length - 1 - end], b[b.length - 1 - end])) end += 1;
  const pieces = b.slice(0, start).map((word) => ["same", word]);
  pieces.push(...middleDiff(a.slice(start, a.length - end), b.slice(start, b.length - end)));
  pieces.push(...b.slice(b.length - end).map((word) => ["same", word]));
  return joined(pieces);
}

const isSame = (one, other) => one.trimEnd() === other.trimEnd();

function middleDiff(a, b) {
  if (a.length * b.length > MOST_CELLS) return [...a.map((word) => ["removed", word]), ...b.map((word) => ["added", word])];
  const width = b.length + 1;
  const longest = new Uint32Array((a.length + 1) * width); // of the common words from i and j on
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      longest[i * width + j] = isSame(a[i], b[j]) ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const pieces = [];
  let [i, j] = [0, 0];
  while (i < a.length && j < b.length) {
    if (isSame(a[i], b[j])) { pieces.push(["same", b[j]]); i += 1; j += 1; }
    else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) { pieces.push(["removed", a[i]]); i += 1; }
    else { pieces.push(["added", b[j]]); j += 1; }
  }
  return [...pieces, ...a.slice(i).map((word) => ["removed", word]), ...b.slice(j).map((word) => ["added", word])];
}

/** One piece for each run of the same kind; between two runs that are the same, what was removed comes first. */
function joined(pieces) {
  const runs = [];
  let changed = { removed: "", added: "" };
  const flush = () => {
    for (const [kind, text] of Object.entries(changed)) if (text) runs.push([kind, text]);
    changed = { removed: "", added: "" };
  };
  for (const [kind, text] of pieces) {
    if (kind !== "same") { changed[kind] += text; continue; }
    flush();
    if (runs.at(-1)?.[0] === kind) runs.at(-1)[1] += text;
    else runs.push([kind, text]);
  }
  flush();
  return runs;
}

/** The diff as elements: what was removed in `del`, what was added in `ins`. */
function diffNodes(from, to) {
  return wordDiff(from, to).map(([kind, text]) => {
    if (kind === "same") return document.createTextNode(text);
    const element = document.createElement(kind === "added" ? "ins" : "del");
    element.textContent = text;
    return element;
  });
}
