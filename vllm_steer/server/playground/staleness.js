"use strict";
// Answers that are not those of the settings on the page. They stay until the next run, and are marked.

/** What the answer of a column depends on, as text; undefined where nothing can be asked. */
function dependsOn(column, asked) {
  if (column.mistake || (column.isSteered && !asked.entries.length)) return undefined;
  return JSON.stringify(askedOf(column, pathOf(asked), requestOf(column, asked), server));
}

/** Marks the columns whose answers are of other settings, and says which these were. */
function markStale(asked) {
  const stale = columns.filter((column) => {
    const isStale = column.samples.length > 0 && column.ran.key !== dependsOn(column, asked);
    column.mark(isStale ? `${column.samples.length === 1 ? "This answer is" : "These answers are"} of the last run`
      + `${column.ran.name === column.name ? "" : `, with ${column.ran.name}`}.` : "");
    return isStale;
  });
  const ran = stale.map((column) => column.ran.asked).find((one) => JSON.stringify(one) !== JSON.stringify(asked));
  const goesOn = ran?.mode === "chat" && asked.mode === "chat" && ran.prompt !== asked.prompt ? " “Next turn” keeps them, and goes on with the new prompt." : "";
  const text = ran ? `The settings have changed. The marked answers are of the last run: ${runOf(ran, asked)}. “Run” replaces them.${goesOn}` : "";
  byId("stale").hidden = !text;
  if (byId("stale").textContent !== text) byId("stale").textContent = text; // a screen reader reads it at every change
}

/** The settings of a run in words; its texts only as far as they are others now. */
function runOf(ran, asked) {
  const short = (text) => (text.length > 60 ? `${text.slice(0, 60)}…` : text);
  const entries = ran.entries.map(({ direction, layer, op, span, ...numbers }) => {
    const told = Object.entries(numbers).map(([name, value]) => `, ${FIELD_NAMES[name]} = ${signed(value)}`).join("");
    return `${direction} at layer ${layer}, ${operationOf(op).label}${told}, on ${SPAN_NAMES[span] ?? span}`;
  });
  const texts = [["prompt", "prompt"], ["system", "system prompt"]].filter(([name]) => ran[name] !== asked[name]).map(([name, what]) => `${what} “${short(ran[name])}”`);
  const measured = ran.measured === asked.measured ? [] : [`projection onto ${ran.measured}`];
  const mode = ran.mode === asked.mode ? [] : [ran.mode === "chat" ? "chat message" : "plain text"];
  return [entries.join(" and ") || "no direction", ...mode, ...texts, summaryOf(ran), ...measured].join("; ");
}
