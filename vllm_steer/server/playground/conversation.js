"use strict";
// Several turns. Each column keeps its own conversation, as a user of that steering would have it; or all go on from one
// answer, so that only the next one differs.

let turn = 1;

/** Commits the answers of this turn; `from` is a column whose conversation all take over. */
function nextTurn(from) {
  const source = (column) => from ?? column;
  const silent = columns.find((column) => source(column).answer === undefined);
  if (running.size) return say("Wait until all answers are complete, or stop them.");
  if (silent) return say(`Column “${silent.name}” has no answer to go on from. Run it, or remove it.`);
  const histories = columns.map((column) => {
    const { messages, asked, answer } = source(column);
    return [...messages, { role: "user", content: asked.prompt }, { role: "assistant", content: answer }];
  });
  const { prompt } = form.elements;
  const isWritten = prompt.value !== "" && !columns.some((column) => source(column).asked.prompt === prompt.value);
  const which = from ? `All columns go on from the answer of “${from.shownName}”.` : "Each column goes on with its own answer.";
  columns.forEach((column, index) => column.goOn(histories[index]));
  turn += 1;
  if (!isWritten) prompt.value = "";
  prompt.focus();
  lastAsked = "";
  share();
  say(`${which} ${isWritten ? "What you have written is the next message: “Run” sends it." : "Write the next message."}`);
  turnChanged();
  return paint();
}

function continueFrom(column, sample) {
  column.chosen = column.samples.indexOf(sample);
  nextTurn(column);
}

function restart() {
  stopAll();
  for (const column of columns) column.goOn([]);
  turn = 1;
  lastAsked = "";
  say("A new conversation.");
  turnChanged();
  paint();
}

/** The messages that a new column begins with: those of the first column. */
const earlierMessages = () => columns[0]?.messages ?? [];

function turnChanged() {
  byId("turn").hidden = turn === 1 || form.elements.mode.value !== "chat";
  byId("turn").textContent = `Turn ${turn}: “Run” ${lastAsked ? "answers the prompt again, still in this turn" : "sends the prompt as the next message"}. `
    + "The messages before it are in each column.";
  byId("next-turn").disabled = running.size > 0 || !columns.length || columns.some(({ answer }) => answer === undefined);
  byId("restart").disabled = turn === 1;
  judgeColumns();
}
