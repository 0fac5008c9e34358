"use strict";
// Selects whose options the server gives. What a link names and the server lacks stays chosen, and is said to be missing.

/** Fills a select with [value, text] options; `wanted` is chosen, also where the server does not have it. */
function fill(select, options, wanted, what) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text ?? value, value)));
  select.setCustomValidity("");
  if (wanted !== undefined && wanted !== "") choose(select, wanted, `This server has no ${what}`);
}

/** Chooses an option. Where there is none of that value, it is added as missing; `lack` begins the sentence about it. */
function choose(select, wanted, lack) {
  for (const option of [...select.options]) if (option.dataset.missing) option.remove();
  if (![...select.options].some(({ value }) => value === String(wanted))) {
    const missing = new Option(`${wanted} (missing)`, wanted);
    missing.dataset.missing = `${lack} ${JSON.stringify(wanted)}. Choose another one.`;
    select.prepend(missing);
  }
  select.value = wanted;
  judgeChoice(select);
}

/** What is missing about a select's choice, or nothing; the browser then refuses to submit the form. */
function judgeChoice(select) {
  const missing = select.selectedOptions[0]?.dataset.missing ?? "";
  select.setCustomValidity(missing);
  return missing;
}

/** The server's directions, by name and layer. */
class Directions {
  constructor(listed, hooked) {
    this.listed = listed;
    this.hooked = hooked;
    this.names = [...new Set(listed.map(({ name }) => name))].sort();
  }

  layersOf(name) {
    return this.listed.filter((one) => one.name === name).map(({ layer }) => layer);
  }

  /** The layer at which a direction is read: the wished one if it belongs there, else its own hooked one. */
  own(name, wished) {
    const layers = this.layersOf(name);
    return layers.includes(Number(wished)) ? Number(wished) : layers.find((layer) => this.hooked.includes(layer)) ?? layers[0];
  }

  at(name, layer) {
    return this.listed.find((one) => one.name === name && one.layer === this.own(name, layer));
  }

  /** Its length; that of a unit direction is 1, so that rounding does not show. */
  lengthOf(name, layer) {
    const one = this.at(name, layer);
    return !one || one.is_unit || !one.norm ? 1 : one.norm;
  }
}
