"use strict";
// A field for one number of an operation, alone or with a slider. What is typed stays, and a mistake in it is named.

let fieldNumber = 0;

class StrengthField {
  /** `name` is alpha, low or high. `onInput()` follows every accepted value, `onChange()` the end of an edit. */
  constructor(name, { hasSlider = false, isOptional = false }, { onInput = () => {}, onChange = () => {} } = {}) {
    this.element = document.getElementById("strength").content.firstElementChild.cloneNode(true);
    const part = (selector) => this.element.querySelector(selector);
    [this.slide, this.range, this.number, this.told] = [".slide", ".range", ".number", ".mistake"].map(part);
    this.isOptional = isOptional;
    part(".slide span").textContent = `${FIELD_NAMES[name]}, slider`;
    part(".symbol").textContent = FIELD_NAMES[name];
    this.unitName = part(".unit");
    this.told.id = `mistake-${++fieldNumber}`;
    this.slide.hidden = !hasSlider;
    this.number.setAttribute("aria-describedby", this.told.id);
    this.mistake = "";
    this.range.addEventListener("input", () => { this.set(this.range.valueAsNumber * this.unit); onInput(); });
    this.number.addEventListener("input", () => {
      this.judge(this.number.valueAsNumber * this.unit);
      if (!this.mistake) onInput();
    });
    for (const input of [this.range, this.number]) input.addEventListener("change", () => { if (!this.mistake) onChange(); });
  }

  /** Takes over the bounds and the unit; what is in the field stays, as a number of the direction's own units. */
  configure(bounds, inNorms) {
    const [isWrong, typed] = [Boolean(this.mistake), this.number.valueAsNumber * this.unit];
    this.bounds = bounds;
    this.inNorms = inNorms;
    this.unit = inNorms && bounds.perNorm ? bounds.perNorm : 1;
    this.unitName.textContent = this.unit === 1 ? "" : "norms";
    if (!isWrong) { this.set(this.value); return; }
    if (Number.isFinite(typed)) this.number.value = this.written(typed);
    this.judge(typed);
  }

  /** A number, or undefined where the field may be empty. */
  set(value) {
    this.value = value;
    this.number.value = Number.isFinite(value) ? this.written(value) : "";
    this.judge(value ?? NaN);
    if (Number.isFinite(value)) this.reachTo(value);
  }

  /** As it stands in the field; a number of norms is short there and stays exact in `value`. */
  written(value) {
    return this.unit === 1 ? neat(value) : Number((value / this.unit).toPrecision(4));
  }

  judge(value) {
    const isEmpty = Number.isNaN(value) && !this.number.validity.badInput;
    this.mistake = mistakeIn(value, this.bounds, this.inNorms, this.isOptional && isEmpty);
    if (!this.mistake) this.value = isEmpty ? undefined : value;
    this.told.textContent = this.mistake;
    this.told.hidden = !this.mistake;
    this.number.setAttribute("aria-invalid", String(Boolean(this.mistake)));
    if (!this.mistake && !isEmpty) this.reachTo(value);
  }

  reachTo(value) {
    const { least, most, reach, isOpen } = this.bounds;
    const wanted = Math.min(Math.max(reach, Math.abs(value)), Math.max(Math.abs(least), Math.abs(most))) / this.unit;
    const step = 10 ** Math.floor(Math.log10(wanted) - 1.5);
    // a slider counts its steps from its least value, so both ends are whole steps, within the bounds
    const whole = (end, round) => Number((step * round(end / step - 1e-9 * Math.sign(end))).toPrecision(6));
    const high = wanted * this.unit < most ? whole(wanted, Math.ceil) : whole(most / this.unit, (one) => Math.floor(one + 2e-9));
    const low = isOpen ? step : -wanted * this.unit > least ? -whole(wanted, Math.ceil) : whole(least / this.unit, (one) => Math.ceil(one - 2e-9));
    for (const [name, end] of [["min", low], ["max", high], ["step", Number(step.toPrecision(6))]]) this.range[name] = end;
    this.range.value = value / this.unit;
  }
}

/** The fields of an operation's numbers, in one element. */
class StrengthFields {
  constructor(element, { hasSlider = false }, hooks) {
    Object.assign(this, { element, hasSlider, hooks, op: undefined, byName: {} });
  }

  /** Shows the fields of `op`; `numbers` are values for those that are new. */
  configure(op, bounds, inNorms, numbers) {
    if (op !== this.op) {
      this.op = op;
      const names = operationOf(op).fields;
      this.byName = Object.fromEntries(names.map((name) => [
        name, new StrengthField(name, { hasSlider: this.hasSlider && name === "alpha", isOptional: name !== "alpha" }, this.hooks),
      ]));
      for (const [name, field] of Object.entries(this.byName)) field.value = Number.isFinite(numbers[name]) ? numbers[name] : undefined;
      this.element.replaceChildren(...Object.values(this.byName).map((field) => field.element));
    }
    for (const field of Object.values(this.byName)) field.configure(bounds, inNorms);
  }

  set(numbers) {
    for (const [name, field] of Object.entries(this.byName)) field.set(numbers[name]);
  }

  get numbers() {
    return Object.fromEntries(Object.entries(this.byName).filter(([, { value }]) => Number.isFinite(value)).map(([name, { value }]) => [name, value]));
  }

  /** What is wrong with the numbers, or nothing. */
  get mistake() {
    const own = Object.values(this.byName).map(({ mistake }) => mistake).find(Boolean);
    if (own) return own;
    const { low, high } = this.numbers;
    if (this.op === "clamp" && low === undefined && high === undefined) return "A clamp needs low, high or both.";
    return low > high ? `low is ${written(low)} and high ${written(high)}; allowed: low up to high.` : "";
  }

  focus() {
    const wrong = Object.values(this.byName).find(({ mistake }) => mistake) ?? Object.values(this.byName)[0];
    wrong?.number.focus();
  }
}
