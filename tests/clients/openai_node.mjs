// OpenAI's package for Node, driven by test_openai_node.py.
//
// In: {"baseURL", "apiKey", "calls": [[resource, body, options], ...]}. Out: the result of each call, in the same order: the
// reply, the list of chunks where the body says "stream", or {"raised": class, ...} where the package raised one of its errors.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const { baseURL, apiKey, calls } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL, apiKey }); // the default: two retries
const resources = { chat: client.chat.completions, completions: client.completions, responses: client.responses };
const noTool = { name: "none", parameters: { type: "object", properties: {} }, function: () => "" };
const helpers = {
  helper: (body) => client.chat.completions.stream(body).finalChatCompletion(),
  runTools: (body) =>
    client.chat.completions
      .runTools({ ...body, tools: [{ type: "function", function: noTool }], tool_choice: "none" })
      .finalChatCompletion(),
  responsesHelper: (body) => client.responses.stream(body).finalResponse(),
};

async function listed(items) {
  const list = [];
  for await (const item of items) list.push(item);
  return list;
}

async function call([resource, body, options]) {
  try {
    if (resource === "models") return await listed(client.models.list());
    if (resource in helpers) return await helpers[resource](body);
    const reply = await resources[resource].create(body, options);
    return body.stream ? await listed(reply) : reply;
  } catch (error) {
    if (!(error instanceof OpenAI.OpenAIError)) throw error;
    return { raised: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
}

console.log(JSON.stringify(await Promise.all(calls.map(call))));
