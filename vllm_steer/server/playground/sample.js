"use strict";
// One answer: its text in chunks of tokens, and their projections.

const finite = (values) => values.filter((value) => Number.isFinite(value));
const meanOf = (values) => finite(values).reduce((sum, value, _, all) => sum + value / all.length, 0);

class Sample {
  /** `onContinue()` follows the button that goes on with this answer in all columns. */
  constructor(seed, { onContinue }) {
    this.element = document.getElementById("sample").content.firstElementChild.cloneNode(true);
    const part = (name) => this.element.querySelector(name);
    [this.heading, this.output, this.difference, this.detail] = ["h3", ".output", ".difference", ".detail"].map(part);
    [this.continueButton, this.chooser] = [".continue", ".chooser"].map(part);
    this.continueButton.addEventListener("click", onContinue);
    this.seed = seed;
    this.spans = []; // {element, first, count}: a chunk of the reply and the tokens in it
    this.values = []; // by token of the generated span
    this.tokens = 0;
    this.text = "";
    this.isDone = false;
    // one tab stop for the whole reply, arrow keys from token to token
    this.output.addEventListener("keydown", (event) => this.walk(event));
    for (const type of ["focusin", "mouseover"]) this.output.addEventListener(type, (event) => this.tell(event.target));
  }

  take({ text, tokens, trace, readout, finish, reason }, measured) {
    if (text) {
      const element = document.createElement("span");
      element.textContent = text;
      element.tabIndex = this.spans.length ? -1 : 0;
      this.output.append(element);
      // tokens that had no text of their own yet belong to the text that completes them
      const first = this.spans.length ? this.spans.at(-1).first + this.spans.at(-1).count : 0;
      this.spans.push({ element, first, count: this.tokens + tokens - first });
      this.text += text;
    }
    this.tokens += tokens;
    const own = trace?.[measured];
    own?.values?.forEach((value, index) => { this.values[own.start + index] = value; });
    if (readout) this.readout = readout;
    if (finish) Object.assign(this, { finish, reason });
  }

  /** The reply is complete, or will get no further. */
  end() {
    this.isDone = true;
    const mean = Object.values(Object.values(this.readout?.projections ?? {})[0] ?? {})[0];
    const told = this.readout?.error ? `, not read: ${this.readout.error}`
      : this.readout?.trace?.error ? `, not traced: ${this.readout.trace.error}`
        : mean === undefined || mean === null ? "" : `, mean projection ${shown(mean)} over ${counted(this.readout.num_tokens, "token")}`;
    const { stopped } = this.readout ?? {};
    // no later token is shown than the one with which the stop held
    const where = stopped ? `, stopped at token ${this.tokens}, value ${shown(stopped.value)}` : this.finish === "length" ? ", cut at max tokens" : "";
    this.summary = `${counted(this.tokens, "token")}${told}${where}`;
    this.detail.textContent = this.summary;
  }

  valueOf({ first, count }) {
    const known = finite(this.values.slice(first, first + count));
    return known.length ? meanOf(known) : undefined;
  }

  /** Colours the tokens: from −1, the low colour, to 1, the high one. */
  shade({ centre, reach }) {
    for (const span of this.spans) {
      const value = this.valueOf(span);
      if (value === undefined) continue;
      span.far = Math.max(-1, Math.min(1, (value - centre) / reach));
      const { element, far } = span;
      element.style.backgroundColor =
        `color-mix(in srgb, var(${far < 0 ? "--low" : "--high"}) ${Math.round(60 * Math.abs(far))}%, transparent)`;
      element.dataset.value = shown(value);
      element.title = `${shown(value)}`;
    }
  }

  /** Shows the words by which this answer differs from `text`, or the answer itself if there is no text. */
  compare(text) {
    const differs = text !== undefined && this.isDone;
    this.output.hidden = differs;
    this.difference.hidden = !differs;
    this.difference.replaceChildren(...(differs ? diffNodes(text, this.text) : []));
  }

  tell(target) {
    const span = this.spans.find(({ element }) => element === target);
    if (!span) return;
    const value = this.valueOf(span);
    const which = span.count > 1 ? `Tokens ${span.first + 1}–${span.first + span.count}` : `Token ${span.first + 1}`;
    this.detail.textContent = `${which} ${JSON.stringify(target.textContent)}: `
      + (value === undefined ? "no value; a reply's last token is not fed back" : shown(value));
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

  toJson() {
    const { text, tokens, seed, finish, reason, readout, values } = this;
    return { seed, text, num_tokens: tokens, finish_reason: finish ?? null, stop_reason: reason ?? null, readout: readout ?? null, trace: [...values].map((value) => value ?? null) };
  }
}
