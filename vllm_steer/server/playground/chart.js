"use strict";
// The projections over the tokens: one line a column. The geometry serves the page's SVG and the saved picture.

const SVG = "http://www.w3.org/2000/svg";
const ACROSS = "token of the answer";
const MARGIN = { left: 46, right: 12, top: 10, bottom: 34 };

/** [{name, number, isDone, means, traces}] of the columns that have values. */
function seriesOf(columns) {
  return columns.map((column, number) => {
    const traces = column.samples.map(({ values }) => [...values]).filter((values) => finite(values).length);
    const length = Math.max(0, ...traces.map((values) => values.length));
    const means = Array.from({ length }, (_, token) => {
      const known = finite(traces.map((values) => values[token]));
      return known.length ? meanOf(known) : undefined;
    });
    return { name: column.shownName, number, means, traces };
  }).filter(({ means }) => means.length);
}

/** Round numbers from about `low` to about `high`, some `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let index = Math.ceil(low / step); index * step <= high + 1e-9 * step; index += 1) found.push(Number((index * step).toPrecision(12)));
  return found;
}

/** The chart in pixels: {width, height, across, up, lines: [{name, number, points, faint}]}. */
function chartOf(series, width, height) {
  const all = series.flatMap(({ traces }) => traces.flatMap(finite));
  let [low, high] = [Math.min(...all), Math.max(...all)];
  if (high - low < 1e-9 * Math.max(1, Math.abs(high))) [low, high] = [low - 1, high + 1];
  const [pad, last] = [0.05 * (high - low), Math.max(2, ...series.map(({ means }) => means.length))];
  const x = (token) => MARGIN.left + (token / (last - 1)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => height - MARGIN.bottom - ((value - low + pad) / (high - low + 2 * pad)) * (height - MARGIN.top - MARGIN.bottom);
  const line = (values) => alone(values.flatMap((value, token) => (Number.isFinite(value) ? [[x(token), y(value)]] : [])));
  // a single value is a short piece of its line, so that it looks like the line's legend
  const alone = (points) => {
    if (points.length !== 1) return points;
    const [[at, height]] = points;
    const from = Math.min(Math.max(at - 17, MARGIN.left), width - MARGIN.right - 34);
    return [[from, height], [from + 34, height]];
  };
  return {
    width, height,
    across: ticks(1, last, Math.min(last, width / 90)).filter((token) => token >= 1 && Number.isInteger(token)).map((token) => ({ at: x(token - 1), text: String(token) })),
    up: ticks(low - pad, high + pad, 5).map((value) => ({ at: y(value), text: String(value).replace("-", "−") })),
    lines: series.map(({ name, number, means, traces }) => ({ name, number, points: line(means), faint: traces.length > 1 ? traces.map(line) : [] })),
  };
}

const svgElement = (name, attributes, text) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};
const pathOfPoints = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** Draws the chart, its legend and its table; hides the figure where nothing has been measured. */
function drawChart(columns, what) {
  const series = seriesOf(columns);
  byId("chart").hidden = series.length === 0;
  if (!series.length) return;
  const svg = byId("chart-svg");
  const { width, height, across, up, lines } = chartOf(series, Math.max(svg.clientWidth, 240), 260);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [svgElement("title", { id: "chart-title" }, `${what}, by token`), svgElement("desc", { id: "chart-desc" }, described(series))];
  for (const { at, text } of up) {
    parts.push(svgElement("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
    parts.push(svgElement("text", { class: "tick", x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" }, text));
  }
  for (const { at, text } of across) parts.push(svgElement("text", { class: "tick", x: at, y: height - MARGIN.bottom + 16, "text-anchor": "middle" }, text));
  parts.push(svgElement("text", { class: "tick", x: width - MARGIN.right, y: height - 3, "text-anchor": "end" }, ACROSS));
  for (const { number, points, faint } of lines) {
    for (const one of faint) parts.push(svgElement("path", { class: `line faint line-${styleOf(number).hue}`, d: pathOfPoints(one) }));
    parts.push(styledLine(number, pathOfPoints(points)));
  }
  svg.replaceChildren(...parts);
  byId("chart-text").textContent = `${what}, by token${lines.some(({ faint }) => faint.length) ? "; strong lines are means over the samples, faint ones the samples" : ""}.`;
  byId("chart-legend").replaceChildren(...lines.map(legendItem));
  byId("chart-rows").replaceChildren(...series.map(tableRow));
}

function styledLine(number, d) {
  const { hue, dash } = styleOf(number);
  return svgElement("path", { class: `line line-${hue}`, d, ...(dash ? { "stroke-dasharray": dash } : {}) });
}

function legendItem({ name, number }) {
  const item = document.createElement("li");
  const key = svgElement("svg", { viewBox: "0 0 34 10", width: 34, height: 10, "aria-hidden": "true" });
  key.append(styledLine(number, "M1 5L33 5"));
  item.append(key, name);
  return item;
}

const figuresOf = ({ means }) => {
  const known = finite(means);
  return { count: known.length, first: known[0], mean: meanOf(known), least: Math.min(...known), most: Math.max(...known), last: known.at(-1) };
};

function tableRow(one) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = one.name;
  const { count, ...values } = figuresOf(one);
  row.append(head, ...[String(count), ...Object.values(values).map(shown)].map((text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  }));
  return row;
}

const described = (series) => series.map((one) => {
  const { count, first, mean, least, most, last } = figuresOf(one);
  return `${one.name}: ${counted(count, "token")}, mean ${shown(mean)}, from ${shown(first)} to ${shown(last)}, between ${shown(least)} and ${shown(most)}.`;
}).join(" ");
