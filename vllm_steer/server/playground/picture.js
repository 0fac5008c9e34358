"use strict";
// The columns and the chart as a picture, drawn on a canvas.

const PICTURE = { width: 1200, gap: 24, line: 22, size: 15, most: 16_000 };

/** Draws on canvases: once to measure the height, once for good. */
class Drawing {
  constructor(height, scale) {
    this.canvas = document.createElement("canvas");
    [this.canvas.width, this.canvas.height] = [PICTURE.width * scale, Math.ceil(height * scale)];
    this.context = this.canvas.getContext("2d");
    this.context.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    this.colour = (name) => style.getPropertyValue(`--${name}`).trim();
    this.font(PICTURE.size);
    this.fill("paper", 0, 0, PICTURE.width, height);
  }

  font(size, weight = "") {
    this.context.font = `${weight} ${size}px ${this.colour("sans")}`;
  }

  fill(colour, x, y, width, height, opacity = 1) {
    this.context.globalAlpha = opacity;
    this.context.fillStyle = this.colour(colour);
    this.context.fillRect(x, y, width, height);
    this.context.globalAlpha = 1;
  }

  text(text, x, y, colour = "ink") {
    this.context.fillStyle = this.colour(colour);
    this.context.fillText(text, x, y);
  }

  /** A line of a column's style; faint ones are thin and have no dash. */
  stroke(points, number, isFaint = false) {
    const { hue, dash } = styleOf(number);
    const { context } = this;
    context.strokeStyle = this.colour(`line-${hue}`);
    [context.lineWidth, context.globalAlpha] = isFaint ? [1, 0.4] : [2, 1];
    context.setLineDash(isFaint ? [] : dash.split(" ").filter(Boolean).map(Number));
    context.stroke(new Path2D(pathOfPoints(points)));
    context.globalAlpha = 1;
  }

  /** Writes [{text, far, mark}] pieces from (x, y) down within `width`; returns where the next line would be. */
  flow(pieces, x, y, width, colour = "ink") {
    let [left, line] = [x, y];
    const newLine = () => { left = x; line += PICTURE.line; };
    for (const { text, far = 0, mark } of pieces) {
      for (const word of text.match(/\n|\s+|[^\s]+/g) ?? []) {
        if (word === "\n") { newLine(); continue; }
        const isSpace = !word.trim();
        if (left > x && left + this.context.measureText(word).width > x + width) newLine();
        if (isSpace && left === x && line > y) continue; // no space at the start of a line
        for (const part of this.fitting(word, width)) {
          const wide = this.context.measureText(part).width;
          if (left > x && left + wide > x + width) newLine();
          if (far) this.fill(far < 0 ? "low" : "high", left, line - 15, wide, 20, 0.6 * Math.abs(far));
          this.text(part, left, line, mark === "removed" ? "warn" : colour);
          if (mark) this.fill(mark === "removed" ? "warn" : "link", left, line + (mark === "removed" ? -5 : 3), wide, 1);
          left += wide;
        }
      }
    }
    return line + PICTURE.line;
  }

  /** A word, or its pieces where it is wider than a line. */
  fitting(word, width) {
    if (this.context.measureText(word).width <= width) return [word];
    const parts = [""];
    for (const sign of word) {
      if (this.context.measureText(parts.at(-1) + sign).width > width) parts.push("");
      parts[parts.length - 1] += sign;
    }
    return parts;
  }
}

function drawColumn(drawing, column, number, x, y, width) {
  drawing.stroke([[x, y + 1], [x + width, y + 1]], number);
  drawing.font(PICTURE.size, "bold");
  let at = drawing.flow([{ text: column.shownName }], x, y + 24, width);
  drawing.font(PICTURE.size);
  for (const { role, content } of column.messages) at = drawing.flow([{ text: `${role === "user" ? "User" : "Answer"}: ${content}` }], x, at, width, "soft");
  for (const sample of column.samples) {
    if (!sample.heading.hidden) at = drawing.flow([{ text: sample.heading.textContent }], x, at + 4, width, "soft");
    const differs = !sample.difference.hidden;
    const pieces = differs
      ? [...sample.difference.childNodes].map((node) => ({ text: node.textContent, mark: { INS: "added", DEL: "removed" }[node.nodeName] }))
      : sample.spans.map(({ element: span, far }) => ({ text: span.textContent, far }));
    at = drawing.flow(pieces, x, at, width);
    at = drawing.flow([{ text: sample.summary ?? "" }], x, at, width, "soft");
  }
  return column.error.hidden ? at : drawing.flow([{ text: column.error.textContent }], x, at, width, "warn");
}

function drawLines(drawing, columns, y) {
  const series = seriesOf(columns);
  if (!series.length) return y;
  const { context } = drawing;
  const { across, up, lines, width, height } = chartOf(series, PICTURE.width - 2 * PICTURE.gap, 300);
  let at = drawing.flow([{ text: byId("chart-text").textContent }], PICTURE.gap, y, width, "soft");
  context.save();
  context.translate(PICTURE.gap, at);
  drawing.font(12);
  for (const tick of up) { drawing.fill("rule", MARGIN.left, tick.at, width - MARGIN.left - MARGIN.right, 1); drawing.text(tick.text, 2, tick.at + 4, "soft"); }
  for (const tick of across) drawing.text(tick.text, tick.at - 4, height - MARGIN.bottom + 16, "soft");
  drawing.text(ACROSS, width - MARGIN.right - context.measureText(ACROSS).width, height - 3, "soft");
  for (const { number, points, faint } of lines) {
    for (const one of faint) drawing.stroke(one, number, true);
    drawing.stroke(points, number);
  }
  for (const [index, { name, number }] of lines.entries()) {
    drawing.stroke([[MARGIN.left, height + 14 + 20 * index], [MARGIN.left + 40, height + 14 + 20 * index]], number);
    drawing.text(name, MARGIN.left + 50, height + 18 + 20 * index);
  }
  context.restore();
  drawing.font(PICTURE.size);
  at += height + 20 * lines.length + 20;
  return at;
}

function drawAll(drawing, columns, { title, asked }) {
  const { gap } = PICTURE;
  drawing.font(20, "bold");
  let at = drawing.flow([{ text: title }], gap, gap + 16, PICTURE.width - 2 * gap);
  drawing.font(PICTURE.size);
  at = drawing.flow([{ text: asked }], gap, at, PICTURE.width - 2 * gap, "soft") + 8;
  const across = Math.min(columns.length, 3) || 1;
  const width = (PICTURE.width - gap * (across + 1)) / across;
  for (let first = 0; first < columns.length; first += across) {
    at = Math.max(...columns.slice(first, first + across)
      .map((column, index) => drawColumn(drawing, column, first + index, gap + index * (width + gap), at, width))) + 16;
  }
  if (!byId("legend").hidden) at = drawing.flow([{ text: `${byId("legend-text").textContent} The ends of the scale are ${byId("lowest").textContent} and ${byId("highest").textContent}.` }], gap, at, PICTURE.width - 2 * gap, "soft") + 8;
  return drawLines(drawing, columns, at) + gap;
}

/** A PNG of what the columns and the chart show. */
function pictureOf(columns, texts) {
  const height = drawAll(new Drawing(100, 1), columns, texts);
  const drawing = new Drawing(height, Math.min(2, PICTURE.most / height));
  drawAll(drawing, columns, texts);
  return new Promise((resolve) => { drawing.canvas.toBlob(resolve, "image/png"); });
}
