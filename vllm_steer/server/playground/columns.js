"use strict";
// A column: one α, its reply, and the shading of its tokens.

const shown = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3)).replace("-", "−");
const signed = (alpha) => (alpha > 0 ? `+${alpha}` : String(alpha).replace("-", "−"));
const finite = (values) => values.filter((value) => Number.isFinite(value));
const meanOf = (values) => finite(values).reduce((sum, value, _, all) => sum + value / all.length, 0);

class Column {
  /** `onAlpha(column)` follows every change of α, `onValues()` every new value of a trace. */
  constructor(alpha, { onAlpha, onValues, onCode, onRemove }) {
    this.element = document.getElementById("column").content.firstElementChild.cloneNode(true);
    const part = (name) => this.element.querySelector(name);
    [this.heading, this.range, this.number, this.output, this.detail, this.error] =
      ["h2", ".range", ".number", ".output", ".detail", ".error"].map(part);
    this.onValues = onValues;
    this.clear();
    this.range.addEventListener("input", () => this.setAlpha(this.range.valueAsNumber));
    this.number.addEventListener("input", () => {
      if (this.number.checkValidity() && Number.isFinite(this.number.valueAsNumber)) this.setAlpha(this.number.valueAsNumber, false);
    });
    for (const input of [this.range, this.number]) input.addEventListener("change", () => { this.setAlpha(this.alpha); onAlpha(this); });
    for (const language of ["curl", "python"]) part(`.${language}`).addEventListener("click", () => onCode(this, language));
    part(".remove").addEventListener("click", () => onRemove(this));
    // one tab stop for the whole reply, arrow keys from token to token
    this.output.addEventListener("keydown", (event) => this.walk(event));
    for (const type of ["focusin", "mouseover"]) this.output.addEventListener(type, (event) => this.tell(event.target));
    this.setAlpha(alpha);
  }

  setAlpha(alpha, writeNumber = true) {
    this.alpha = alpha;
    const reach = Number(this.range.max);
    if (Math.abs(alpha) > reach) this.setReach(Math.abs(alpha), Number(this.number.max) || Infinity);
    this.range.value = alpha;
    if (writeNumber) this.number.value = alpha;
    this.heading.textContent = alpha === 0 ? "α = 0, unsteered" : `α = ${signed(alpha)}`;
    for (const [label, element] of [["Reply", this.output], ["Column", this.element]]) {
      element.setAttribute("aria-label", `${label} with ${this.heading.textContent}`);
    }
  }

  /** The slider's end; the number field accepts values up to `limit`. */
  setReach(reach, limit) {
    const wanted = Math.min(Math.max(reach, Math.abs(this.alpha ?? 0)), limit);
    const step = 10 ** Math.floor(Math.log10(wanted) - 1.5);
    const end = step * (wanted < limit ? Math.ceil(wanted / step) : Math.floor(wanted / step));
    for (const [name, value] of [["min", -end], ["max", end], ["step", step]]) this.range[name] = Number(value.toPrecision(6));
    if (Number.isFinite(limit)) [this.number.min, this.number.max] = [-limit, limit];
    if (this.alpha !== undefined) this.range.value = this.alpha;
  }

  clear() {
    this.output.replaceChildren();
    this.detail.textContent = "";
    this.error.hidden = true;
    this.spans = []; // {element, first, count}: a chunk of the reply and the tokens in it
    this.values = []; // by token of the generated span
    this.tokens = 0;
    this.readout = undefined;
  }

  async run(settings, body, signal) {
    this.clear();
    this.hasRun = true;
    this.output.setAttribute("aria-busy", "true");
    try {
      for await (const piece of stream(settings, body, signal)) this.take(piece);
      this.summarise();
    } catch (error) {
      if (error.name === "AbortError") return;
      this.error.textContent = error.message;
      this.error.hidden = false;
      throw error;
    } finally {
      this.output.removeAttribute("aria-busy");
    }
  }

  take({ text, tokens, trace, readout }) {
    if (text) {
      const element = document.createElement("span");
      element.textContent = text;
      element.tabIndex = this.spans.length ? -1 : 0;
      this.output.append(element);
      // tokens that had no text of their own yet belong to the text that completes them
      const first = this.spans.length ? this.spans.at(-1).first + this.spans.at(-1).count : 0;
      this.spans.push({ element, first, count: this.tokens + tokens - first });
    }
    this.tokens += tokens;
    trace?.values.forEach((value, index) => { this.values[trace.start + index] = value; });
    if (readout) this.readout = readout;
    if (text || trace) this.onValues();
  }

  valueOf({ first, count }) {
    const known = finite(this.values.slice(first, first + count));
    return known.length ? meanOf(known) : undefined;
  }

  shade({ centre, reach }) {
    for (const span of this.spans) {
      const value = this.valueOf(span);
      if (value === undefined) continue;
      const far = Math.max(-1, Math.min(1, (value - centre) / reach));
      const { element } = span;
      element.style.backgroundColor =
        `color-mix(in srgb, var(${far < 0 ? "--low" : "--high"}) ${Math.round(60 * Math.abs(far))}%, transparent)`;
      element.dataset.value = shown(value);
      element.title = `${shown(value)}`;
    }
  }

  summarise() {
    const mean = Object.values(Object.values(this.readout?.projections ?? {})[0] ?? {})[0];
    const told = this.readout?.error ? `Not read: ${this.readout.error}`
      : mean === undefined || mean === null ? "" : `, mean projection ${shown(mean)} over ${this.readout.num_tokens} tokens`;
    const { stopped } = this.readout ?? {};
    this.summary = `${this.tokens} tokens${told}${stopped ? `, stopped at ${shown(stopped.value)}` : ""}`;
    this.detail.textContent = this.summary;
  }

  tell(target) {
    const span = this.spans.find(({ element }) => element === target);
    if (!span) return;
    const value = this.valueOf(span);
    const which = span.count > 1 ? `Tokens ${span.first + 1}–${span.first + span.count}` : `Token ${span.first + 1}`;
    const told = `${which} ${JSON.stringify(target.textContent)}: ${value === undefined ? "no value; a reply's last token is not fed back" : shown(value)}`;
    this.detail.textContent = told;
    target.setAttribute("aria-label", told);
  }

  walk(event) {
    const index = this.spans.findIndex(({ element }) => element === document.activeElement);
    const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: this.spans.length - 1 }[event.key];
    if (index < 0 || next === undefined || !this.spans[next]) return;
    event.preventDefault();
    this.spans[index].element.tabIndex = -1;
    this.spans[next].element.tabIndex = 0;
    this.spans[next].element.focus();
  }
}

/**
 * One scale for all columns, so that equal colours are equal numbers; centred on the unsteered reply, if there is one.
 * With `apart`, its width is that of the values without each column's own mean.
 */
function scaleOf(columns, apart) {
  const plain = finite(columns.filter((column) => column.alpha === 0).flatMap((column) => column.values));
  const centre = meanOf(plain);
  const far = columns.flatMap(({ values }) => {
    const middle = apart ? meanOf(values) : centre;
    return finite(values).map((value) => Math.abs(value - middle));
  }).sort((a, b) => a - b);
  if (!far.length) return undefined;
  // the farthest 2 % share the ends' colour; otherwise one outlier would leave the rest without colour
  return { centre, reach: far[Math.floor(0.98 * (far.length - 1))] || 1, unsteered: plain.length > 0 };
}
