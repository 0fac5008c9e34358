"use strict";
// One streamed reply, read to its end; a server that dies or falls silent ends it with an error.

const SILENT_MS = 10_000; // without a byte for so long, the server is asked whether it still answers
const ANSWER_MS = 5_000;

/** Calls `onDead` if the server neither sends anything nor answers a question about it. Slowness alone is no death. */
class Watchdog {
  constructor(onDead) {
    this.onDead = onDead;
    this.heard();
  }

  heard() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.knock(), SILENT_MS);
  }

  async knock() {
    let answers = true;
    try {
      await askSoon("/v1/steering", ANSWER_MS);
    } catch (error) {
      answers = error.status > 0; // any answer is a sign of life
    }
    if (this.done) return;
    if (answers) this.heard();
    else this.onDead();
  }

  end() {
    this.done = true;
    clearTimeout(this.timer);
  }
}

/**
 * Streams the reply to `body`. Yields {index, text, tokens, trace, readout, finish, reason} of one choice at a time:
 * the new text, the number of new tokens, `trace` {name: {start, values}}, and at the end `readout`, why it ended and
 * what stopped it.
 */
async function* stream(path, body, signal) {
  const dead = new AbortController();
  const watchdog = new Watchdog(() => dead.abort());
  try {
    const reply = await ask(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      // token ids tell how many tokens a chunk brings: under load it can be several, or one that has no text yet
      body: JSON.stringify({ ...body, stream: true, return_token_ids: true }),
      signal: AbortSignal.any([signal, dead.signal]),
    });
    for await (const event of eventsOf(reply.body, () => watchdog.heard())) {
      if (event.error) throw new Refused(event.error.code ?? 500, event.error.message);
      for (const choice of event.choices) yield pieceOf(choice);
    }
  } catch (error) {
    if (signal.aborted) throw new DOMException("stopped by the user", "AbortError");
    if (dead.signal.aborted) throw silent();
    if (error instanceof Refused) throw error;
    throw new Refused(0, "The connection broke before the reply was complete. Check that the server still runs, then run again.");
  } finally {
    watchdog.end();
  }
}

function pieceOf(choice) {
  const delta = choice.delta ?? choice;
  const text = delta.content ?? delta.text ?? delta.reasoning ?? "";
  return {
    index: choice.index ?? 0,
    text,
    tokens: choice.token_ids?.length ?? (text ? 1 : 0),
    trace: choice.trace,
    readout: choice.readout,
    finish: choice.finish_reason,
    reason: choice.stop_reason,
  };
}

/** The JSON of each server-sent event, up to [DONE]; it is an error if that never comes. */
async function* eventsOf(stream, onBytes) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  try {
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) throw new Refused(0, "The server ended the reply before it was complete. Check that it still runs, then run again.");
      onBytes();
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const event = line.slice(5).trim();
        if (event === "[DONE]") return;
        yield JSON.parse(event);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // ends the request at the server, where it is not over
  }
}
