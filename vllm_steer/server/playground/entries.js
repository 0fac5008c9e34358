"use strict";
// The directions to steer with: one group of fields for each entry of a request. The first one's numbers differ by
// column; those of the others are the same in all steered columns.

const SPAN = /^(prompt|generated|response|all)(\[(-?\d{1,9}|(-?\d{1,9})?:(-?\d{1,9})?)\])?$/;
const SPAN_NAMES = { response: "the answer", all: "all tokens", prompt: "the prompt", generated: "the answer after its first token" };
const SPANS = Object.keys(SPAN_NAMES);

class EntryRow {
  /** `onChange()` follows every change, `onRemove(row)` the button. */
  constructor({ onChange, onRemove }) {
    this.element = document.getElementById("entry").content.firstElementChild.cloneNode(true);
    const part = (selector) => this.element.querySelector(selector);
    for (const name of ["direction", "layer", "op", "span", "slices"]) this[name] = part(`.${name}`);
    [this.legend, this.slicesLabel, this.told, this.bounds] = ["legend", ".slices-label", ".mistake", ".allowed"].map(part);
    this.op.replaceChildren(...Object.entries(OPERATIONS).map(([value, { label }]) => new Option(label, value)));
    this.numbers = new StrengthFields(part(".numbers"), {}, { onChange });
    this.told.id = `mistake-${++fieldNumber}`;
    this.direction.setAttribute("aria-describedby", this.told.id);
    this.slices.setAttribute("aria-describedby", this.told.id);
    this.direction.addEventListener("change", () => { this.fillLayers(); onChange(); });
    for (const field of [this.layer, this.op, this.span]) field.addEventListener("change", onChange);
    // not at the end of the edit: what moves then would move under a pointer that is about to click
    this.slices.addEventListener("input", onChange);
    part(".remove-entry").addEventListener("click", () => onRemove(this));
  }

  /** Sets the fields to an entry, as far as it says; then call `configure`. */
  fill(entry, server, directions) {
    this.server = server;
    this.directions = directions;
    fill(this.direction, directions.names.map((name) => [name]), entry.direction, "direction");
    this.fillLayers(entry.layer);
    choose(this.op, entry.op ?? "add", "This page has no operation");
    const isOther = entry.span !== undefined && !SPANS.includes(entry.span);
    this.span.value = isOther ? "slices" : entry.span ?? "response";
    this.slices.value = isOther ? entry.span : "";
    this.given = entry;
  }

  fillLayers(wanted) {
    const own = this.directions.layersOf(this.direction.value);
    const options = this.server.layers.map((layer) => [layer, own.includes(layer) ? `${layer}, its own` : layer]);
    fill(this.layer, options, wanted ?? own.find((layer) => this.server.layers.includes(layer)), "hooked layer");
  }

  /** Brings labels, bounds and complaints up to date. */
  configure(index, count, inNorms) {
    const name = `Direction ${index + 1}`;
    this.legend.textContent = count === 1 ? "Direction" : index === 0 ? `${name}: its numbers differ by column` : `${name}: the same in all steered columns`;
    this.element.querySelector(".actions").hidden = index === 0;
    this.element.querySelector(".remove-entry").textContent = `Remove direction ${index + 1}`;
    this.slicesLabel.hidden = this.span.value !== "slices";
    const bounds = this.limits();
    this.bounds.textContent = `Allowed ${operationOf(this.op.value).fields.map((field) => FIELD_NAMES[field]).join(" and ")}: ${allowed(bounds, inNorms)}.`;
    if (index > 0) {
      const numbers = this.given ?? {};
      const fallback = this.op.value === "clamp" ? { low: bounds.usual } : { alpha: bounds.usual };
      const isKnown = operationOf(this.op.value).fields.some((field) => Number.isFinite(numbers[field]));
      this.numbers.configure(this.op.value, bounds, inNorms, isKnown ? numbers : fallback);
      this.given = undefined;
    }
    this.told.textContent = this.judge(index);
    this.told.hidden = !this.told.textContent;
  }

  judge(index) {
    const spanMistake = this.span.value === "slices" && !this.slices.value.split("+").every((part) => SPAN.test(part.trim()))
      ? "Allowed: prompt, generated, response, all, slices such as prompt[-5:] or response[:8], and sums of these with +." : "";
    this.slices.setCustomValidity(spanMistake);
    const unfit = judgeChoice(this.op) || (this.op.value !== "add" && this.directions.at(this.direction.value, this.layer.value)?.is_unit === false
      ? `${this.direction.value} is not of length 1, and all but “add” need that. Choose “add”.` : "");
    this.op.setCustomValidity(unfit);
    return judgeChoice(this.direction) || judgeChoice(this.layer) || unfit || spanMistake || (index > 0 ? this.numbers.mistake : "");
  }

  limits(name = this.direction.value) {
    return boundsOf({ op: this.op.value, layer: this.layer.value }, this.directions.lengthOf(name, this.layer.value), this.server);
  }

  read(index) {
    const span = this.span.value === "slices" ? this.slices.value.trim() : this.span.value;
    const layer = Number(this.layer.value);
    // a layer that a link names and the server lacks stays as it is
    const entry = { direction: this.direction.value, layer: Number.isNaN(layer) ? this.layer.value : layer, op: this.op.value, span };
    return index === 0 ? entry : { ...entry, ...this.numbers.numbers };
  }
}
