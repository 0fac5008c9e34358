"use strict";
// What the line of a column looks like: its hue and its dash, the same in the chart, its legend, the picture and the column's edge.

const HUES = 8; // --line-0 and so on of the style sheet
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const EDGES = ["solid", "dashed", "dotted", "double"]; // of the column, in the order of the dashes
const MOST_COLUMNS = HUES * DASHES.length; // so that no two look the same

/** Neighbours differ in both, and columns of the same hue in their dash. */
function styleOf(number) {
  const dash = (number + Math.floor(number / HUES)) % DASHES.length;
  return { hue: number % HUES, dash: DASHES[dash], edge: EDGES[dash] };
}
