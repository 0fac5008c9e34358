"use strict";
// Adding columns: another number, no steering, an alias, or a control with another direction.

const ownRandom = new Map(); // names of random directions that this page has registered -> their cosine

function fillKinds() {
  const group = (label, options) => {
    const element = document.createElement("optgroup");
    element.label = label;
    element.append(...options.map(([text, spec]) => new Option(text, JSON.stringify(spec))));
    return element;
  };
  const others = directions.names.filter((name) => name !== rows[0]?.direction.value);
  const chosen = byId("kind").value;
  const steered = directions.names.length ? [["another number", { kind: "steered" }]] : [];
  const groups = [group("Steering", [...steered, ["unsteered", { kind: "plain" }]])];
  const aliases = Object.keys(server.aliases ?? {});
  if (aliases.length) groups.push(group("Alias of the server", aliases.map((alias) => [alias, { kind: "alias", alias }])));
  if (steered.length) {
    const random = new Option(server.changes ? "a random direction …" : "a random direction (the server has no admin key)", JSON.stringify({ random: true }));
    random.disabled = !server.changes;
    const controls = group("Control: another direction", others.map((name) => [name, { kind: "steered", direction: name }]));
    controls.append(random);
    groups.push(controls);
  }
  byId("kind").replaceChildren(...groups);
  if ([...byId("kind").options].some(({ value }) => value === chosen)) byId("kind").value = chosen;
}

/** The bounds on a column's numbers; those of a control are by its own direction's length. */
const boundsFor = (column) => (rows[0] && directions.names.length ? rows[0].limits(column.direction) : boundsOf({ op: "add" }, 1, server));

/** The layers of a control's direction where it acts at another one; else undefined. */
function awayFrom({ direction }) {
  const own = direction ? directions.layersOf(direction) : [];
  return own.length && !own.includes(Number(rows[0].layer.value)) ? own : undefined;
}

const mainNumber = ({ alpha, low, high }) => alpha ?? low ?? high;
const steeredOnes = () => columns.filter((column) => column.isSteered && !column.direction);

/** The numbers of a column for `op`: `given` as far as they fit it, else some that no other column has. */
function fittedNumbers(given, op, bounds, taken, isOtherKind) {
  const names = operationOf(op).fields;
  if (!isOtherKind && names.some((name) => Number.isFinite(given[name]))) return given;
  const carried = isOtherKind ? undefined : mainNumber(given);
  const value = Number.isFinite(carried) ? carried : nextValue(op, taken, bounds);
  return op === "clamp" ? { low: value } : { alpha: value };
}

/** A control adds a vector of the same length as the strongest column: α‖d‖ is the same, not α. */
function controlNumbers(name) {
  const strongest = steeredOnes().sort((a, b) => Math.abs(mainNumber(b.numbers)) - Math.abs(mainNumber(a.numbers)))[0];
  const [op, layer] = [rows[0].op.value, rows[0].layer.value];
  const numbers = strongest?.strength.numbers ?? fittedNumbers({}, op, rows[0].limits(), []);
  if (op !== "add") return numbers;
  return { alpha: neat(numbers.alpha * directions.lengthOf(rows[0].direction.value, layer) / directions.lengthOf(name, layer)) };
}

function addColumn(spec) {
  const op = rows[0]?.op.value ?? "add";
  if (spec.kind === "steered") {
    const taken = steeredOnes().map(({ numbers }) => mainNumber(numbers));
    const numbers = spec.direction && !Number.isFinite(mainNumber(spec)) ? controlNumbers(spec.direction)
      : fittedNumbers(spec, op, boundsFor(spec), taken);
    spec = { ...numbers, kind: spec.kind, ...(spec.direction ? { direction: spec.direction } : {}) };
  }
  const column = new Column(spec, {
    onInput: share,
    onValues: valuesChanged,
    onCode: showCode,
    onContinue: continueFrom,
    onChange: (changed) => {
      share();
      if (!changed.wasRun || changed.mistake || !byId("again").checked) return;
      // replies to other settings would stay next to this one
      run(JSON.stringify(settings()) === lastAsked ? [changed] : [...columns]);
    },
    onRemove: (gone) => {
      running.get(gone)?.abort();
      columns.splice(columns.indexOf(gone), 1);
      gone.element.remove();
      configureColumns();
      share();
      turnChanged();
      paint();
      byId("add").focus();
    },
  });
  column.goOn(earlierMessages());
  columns.push(column);
  byId("columns").append(column.element);
  configureColumns();
  return column;
}

/** Brings all columns up to date with the form. */
function configureColumns() {
  const op = rows[0]?.op.value ?? "add";
  const taken = [];
  columns.forEach((column, index) => {
    const bounds = boundsFor(column);
    if (column.isSteered) {
      if (column.op !== undefined && column.op !== op) {
        const isOtherKind = !(operationOf(op).inNorms && operationOf(column.op).inNorms);
        column.give(fittedNumbers(column.strength.numbers, op, bounds, taken, isOtherKind));
      }
      if (!column.direction) taken.push(mainNumber(column.numbers));
    }
    const cosine = ownRandom.get(column.direction);
    const byChance = cosine === undefined ? "" : `Its cosine with ${rows[0].direction.value} is ${shown(cosine)}, by chance. `;
    const away = awayFrom(column);
    const moved = away === undefined ? "" : `${column.direction} is a direction of layer ${away.join(" and ")}; here it acts at layer ${rows[0].layer.value}.`;
    const missing = column.kind === "alias" && !Object.hasOwn(server.aliases ?? {}, column.alias)
      ? `This server has no alias ${JSON.stringify(column.alias)}. Remove the column.`
      : column.direction && !directions.names.includes(column.direction)
        ? `This server has no direction ${JSON.stringify(column.direction)}. Remove the column.` : "";
    column.configure({
      op, bounds, index, missing, inNorms: form.elements.unit.value === "norms",
      at: away === undefined ? "" : ` at layer ${rows[0].layer.value}`, note: (byChance + moved).trim(),
    });
  });
}

class RandomDialog {
  constructor() {
    this.dialog = byId("random");
    this.form = this.dialog.querySelector("form");
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.register(); });
    byId("random-close").addEventListener("click", () => this.dialog.close());
    byId("random-clear").addEventListener("click", () => this.clear());
  }

  open() {
    const name = rows[0].direction.value;
    byId("random-why").textContent = `The page draws a normal random vector from the seed, makes it as long as ${name} at layer ${readLayer(name)} and registers it `
      + `as ${RANDOM}SEED-${name}. What it does at the same α is what any direction of that length does. All users of this server will see it until it is deleted.`;
    this.tell("");
    this.form.elements.admin.value = keys.admin ?? "";
    byId("random-clear").disabled = ownRandom.size === 0;
    this.dialog.showModal();
  }

  tell(text) {
    byId("random-told").textContent = text;
    byId("random-told").hidden = !text;
  }

  async change(action) {
    keys.admin = this.form.elements.admin.value;
    try {
      await action();
      this.dialog.close();
    } catch (error) {
      if (error.status === 401 || error.status === 403) keys.admin = null;
      this.tell(error.message);
    }
  }

  register() {
    return this.change(async () => {
      const name = rows[0].direction.value;
      const made = await registerRandom(name, readLayer(name), Number(this.form.elements.seed.value));
      ownRandom.set(made.name, made.cosine);
      await registryChanged(`Registered ${made.name}.`);
      addColumn({ kind: "steered", direction: made.name }).strength.focus();
      share();
      turnChanged();
    });
  }

  clear() {
    return this.change(async () => {
      for (const name of [...ownRandom.keys()]) {
        await deleteDirection(name);
        ownRandom.delete(name);
      }
      await registryChanged("The random directions of this page are deleted.");
    });
  }
}
