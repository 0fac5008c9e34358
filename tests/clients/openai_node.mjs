// OpenAI's package for Node, driven by test_openai_node.py.
//
// In: {"baseURL", "apiKey", "calls": [[resource, body], ...]}. Out: the result of each call, in the same order: the reply,
// the list of chunks where the body says "stream", or {"raised": class, ...} where the package raised one of its errors.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const { baseURL, apiKey, calls } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL, apiKey }); // the default: two retries
const resources = { chat: client.chat.completions, completions: client.completions, responses: client.responses };

async function listed(items) {
  const list = [];
  for await (const item of items) list.push(item);
  return list;
}

async function call([resource, body]) {
  try {
    if (resource === "models") return await listed(client.models.list());
    if (resource === "helper") return await client.chat.completions.stream(body).finalChatCompletion();
    const reply = await resources[resource].create(body);
    return body.stream ? await listed(reply) : reply;
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error;
    return { raised: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
}

console.log(JSON.stringify(await Promise.all(calls.map(call))));
