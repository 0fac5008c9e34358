// Vercel's AI SDK with its provider for servers of OpenAI's API, driven by test_ai_sdk.py.
//
// In: {"baseURL", "apiKey", "calls": [{"model", "prompt", ...}, ...]}. A call's other fields are options of `generateText` and
// `streamText`, and four of this script's own: "stream", "completion" (the route of bare texts), "extract" (the provider has a
// metadataExtractor) and "body" (fields that its transformRequestBody adds). Out: what each call gave, in the same order.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";

const { baseURL, apiKey, calls } = JSON.parse(readFileSync(0, "utf8"));
const readoutOf = (chunk) => chunk?.choices?.[0]?.readout;

const metadataExtractor = {
  extractMetadata: async ({ parsedBody }) => ({ steered: { readout: readoutOf(parsedBody) } }),
  createStreamExtractor() {
    let readout;
    return {
      processChunk: (chunk) => (readout = readoutOf(chunk) ?? readout),
      buildMetadata: () => ({ steered: { readout } }),
    };
  },
};

async function call({ model, stream, completion, extract, body, ...options }) {
  const provider = createOpenAICompatible({
    name: "steered",
    baseURL,
    apiKey,
    metadataExtractor: extract ? metadataExtractor : undefined,
    transformRequestBody: body ? (built) => ({ ...built, ...body }) : undefined,
  });
  const asked = { model: completion ? provider.completionModel(model) : provider(model), ...options };
  try {
    if (!stream) {
      const { text, response, providerMetadata, warnings } = await generateText(asked);
      return { text, response, providerMetadata, warnings };
    }
    let failed;
    const result = streamText({ ...asked, onError: ({ error }) => (failed = error) });
    const parts = [];
    for await (const part of result.fullStream) parts.push(part);
    if (failed) throw failed;
    return { text: await result.text, response: await result.response, providerMetadata: await result.providerMetadata, parts };
  } catch (error) {
    if (!error.name?.startsWith("AI_")) throw error;
    return { raised: error.name, status: error.statusCode, code: error.data?.error.code, message: error.message };
  }
}

console.log(JSON.stringify(await Promise.all(calls.map(call))));
