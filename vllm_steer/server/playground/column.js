"use strict";
// A column: one way to steer, its conversation so far and its answers.

class Column {
  /**
   * `spec` is {kind: "plain"}, {kind: "alias", alias} or {kind: "steered", alpha | low, high, direction}, the latter
   * a control where it has a direction of its own. `onInput()` follows every accepted value, `onChange(column)` the end
   * of an edit, `onContinue(column, sample)` the button of an answer.
   */
  constructor(spec, hooks) {
    this.element = document.getElementById("column").content.firstElementChild.cloneNode(true);
    const part = (name) => this.element.querySelector(name);
    [this.heading, this.told, this.history, this.stale, this.list, this.error] = ["h2", ".told", ".history", ".stale", ".samples", ".error"].map(part);
    this.codeButtons = [".curl", ".python"].map(part);
    const { kind, direction, alias, ...numbers } = spec;
    Object.assign(this, { kind, direction, alias, given: numbers, hooks, messages: [], samples: [], chosen: 0 });
    this.strength = new StrengthFields(part(".numbers"), { hasSlider: true }, {
      onInput: () => { this.title(); hooks.onInput(); },
      onChange: () => { this.title(); hooks.onChange(this); },
    });
    for (const language of ["curl", "python"]) part(`.${language}`).addEventListener("click", () => hooks.onCode(this, language));
    part(".remove").addEventListener("click", () => hooks.onRemove(this));
  }

  get isPlain() { return this.kind === "plain"; }
  get isSteered() { return this.kind === "steered"; }
  get numbers() { return this.strength.op === undefined ? this.given : this.strength.numbers; }
  get asked() { return this.ran?.asked; }
  /** Whether its answers, or why it has none, stand in it. */
  get wasRun() { return this.samples.length > 0 || !this.error.hidden; }
  /** The name of what its answers are of, also where its number has changed since. */
  get shownName() { return this.samples.length ? this.ran.name : this.name; }
  get mistake() { return this.missing || (this.isSteered ? this.strength.mistake : ""); }

  get spec() {
    const { kind, direction, alias } = this;
    return kind === "alias" ? { kind, alias } : kind === "plain" ? { kind } : { kind, ...(direction ? { direction } : {}), ...this.numbers };
  }

  /** Takes over what the form says of the first entry. `missing` says what the server lacks for this column. */
  configure({ op, bounds, inNorms, index, missing, at, note }) {
    Object.assign(this, { op, bounds, inNorms, missing, at });
    const { hue, edge } = styleOf(index);
    this.element.style.setProperty("--own", `var(--line-${hue})`);
    this.element.style.setProperty("--edge", edge);
    if (this.isSteered) this.strength.configure(op, bounds, inNorms, this.given);
    this.told.textContent = missing || note || "";
    this.told.classList.toggle("mistake", Boolean(missing));
    this.told.hidden = !this.told.textContent;
    this.title();
  }

  /** Gives it other numbers, for another operation. */
  give(numbers) {
    this.given = numbers;
    this.strength.op = undefined;
  }

  title() {
    this.heading.textContent = this.name;
    this.element.setAttribute("aria-label", `Column ${this.name}`);
    for (const sample of this.samples) this.label(sample);
  }

  get name() {
    if (this.kind === "plain") return "unsteered";
    if (this.kind === "alias") return `alias ${this.alias}`;
    const numbers = this.strength.numbers;
    const told = Object.entries(numbers).map(([name, value]) => {
      const norms = this.inNorms && this.bounds.perNorm ? ` (${String(Number((value / this.bounds.perNorm).toPrecision(3))).replace("-", "−")} norms)` : "";
      return `${FIELD_NAMES[name]} = ${signed(value)}${norms}`;
    }).join(", ") || "no number";
    return this.direction ? `control ${this.direction}${this.at}, ${told}` : told;
  }

  label(sample) {
    const which = this.samples.length > 1 ? `Sample ${this.samples.indexOf(sample) + 1}, seed ${sample.seed}` : "";
    sample.heading.textContent = which;
    sample.heading.hidden = !which;
    for (const text of [sample.output, sample.difference]) text.setAttribute("aria-label", `${which || "Answer"} with ${this.shownName}`);
  }

  /**
   * Asks for the answers and shows them as they come. Resolves to whether the user stopped it. `ran` is {asked, name, key}:
   * the settings, the name of the column and what the answers depend on.
   */
  async run(ran, path, body, signal) {
    const { asked } = ran;
    this.clear();
    this.ran = ran;
    this.samples = Array.from({ length: samplesOf(asked) }, (_, index) => this.newSample(asked.seed + index));
    this.list.replaceChildren(...this.samples.map(({ element }) => element));
    this.samples.forEach((sample) => this.label(sample));
    this.element.setAttribute("aria-busy", "true");
    let isStopped = false;
    try {
      for await (const piece of stream(path, body, signal)) {
        const sample = this.samples[piece.index];
        sample.take(piece, asked.measured);
        if (piece.finish) sample.end();
        if (piece.text || piece.trace || piece.finish) this.hooks.onValues();
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        if (this.samples.every(({ tokens }) => tokens === 0)) this.clear();
        this.fail(error.message);
        throw error;
      }
      isStopped = true;
    } finally {
      this.element.removeAttribute("aria-busy");
      for (const sample of this.samples) if (!sample.isDone) sample.end();
      this.hooks.onValues();
    }
    this.offerToContinue();
    return isStopped;
  }

  newSample(seed) {
    const sample = new Sample(seed, { onContinue: () => this.hooks.onContinue(this, sample) });
    return sample;
  }

  clear() {
    this.samples = [];
    this.chosen = 0;
    this.list.replaceChildren();
    this.ran = undefined;
    this.error.hidden = true;
    this.mark("");
  }

  /** Marks its answers as those of an earlier run, with the sentence that says so; or not, without one. */
  mark(sentence) {
    this.element.classList.toggle("is-stale", Boolean(sentence));
    this.stale.hidden = !sentence;
    if (this.stale.textContent !== sentence) this.stale.textContent = sentence;
  }

  /** Takes away its answers, because its number is not sent. */
  leaveOut() {
    const { mistake } = this;
    this.clear();
    const isTold = this.missing || this.element.querySelector(".numbers .mistake:not([hidden])");
    this.fail(isTold ? "This column did not run." : `This column did not run. ${mistake}`);
  }

  /** Whether its request can be had as code; `why` says why not. */
  offerCode(why) {
    for (const button of this.codeButtons) [button.disabled, button.title] = [Boolean(why), why];
  }

  fail(message) {
    this.error.textContent = message;
    this.error.hidden = false;
  }

  offerToContinue() {
    if (this.asked?.mode !== "chat") return;
    for (const [index, sample] of this.samples.entries()) {
      sample.continueButton.hidden = !sample.text;
      sample.continueButton.setAttribute("aria-label", `Continue all from this answer, ${this.samples.length > 1 ? `sample ${index + 1} ` : ""}with ${this.shownName}`);
      const [chooser] = sample.chooser.children;
      chooser.parentElement.hidden = this.samples.length === 1;
      chooser.name = `chosen-${this.list.dataset.number ??= String(++fieldNumber)}`;
      chooser.checked = index === this.chosen;
      chooser.addEventListener("change", () => { this.chosen = index; });
    }
  }

  /** The answer that the conversation goes on with; undefined if there is none. */
  get answer() {
    const sample = this.samples[this.chosen];
    return this.asked?.mode === "chat" && sample?.isDone && sample.text ? sample.text : undefined;
  }

  /** Goes on from `messages`, and shows them. */
  goOn(messages) {
    this.clear();
    this.messages = messages;
    this.history.hidden = messages.length === 0;
    this.history.querySelector("summary").textContent = `${messages.length} earlier messages`;
    this.history.querySelector("dl").replaceChildren(...messages.flatMap(({ role, content }) => {
      const [who, what] = [document.createElement("dt"), document.createElement("dd")];
      who.textContent = role === "user" ? "User" : "Answer";
      what.textContent = content;
      return [who, what];
    }));
  }

  get summary() {
    return this.samples.map(({ summary, seed }) => (this.samples.length > 1 ? `seed ${seed}: ${summary}` : summary)).join(", ");
  }
}
