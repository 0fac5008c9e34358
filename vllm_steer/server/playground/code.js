"use strict";
// A request as code for other clients.

function asCurl(path, body) {
  const quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  const key = keys.api === null ? "" : '  -H "Authorization: Bearer $API_KEY" \\\n';
  return `curl ${location.origin}${ROOT}${path} \\\n${key}  -H 'Content-Type: application/json' \\\n  -d '${quoted}'\n`;
}

function asPython(path, body) {
  const { steering, readout, ...standard } = body;
  const literal = (value) => { // the output of JSON.stringify as a Python literal
    if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
    if (value !== null && typeof value === "object") {
      return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`).join(", ")}}`;
    }
    return { true: "True", false: "False", null: "None" }[JSON.stringify(value)] ?? JSON.stringify(value);
  };
  const isChat = path.endsWith("/chat/completions");
  const call = isChat ? "client.chat.completions.create" : "client.completions.create";
  const text = isChat ? "choice.message.content" : "choice.text";
  const lines = Object.entries(standard).map(([name, value]) => `    ${name}=${literal(value)},\n`);
  const own = Object.entries({ steering, readout }).filter(([, value]) => value !== undefined);
  if (own.length) {
    lines.push(`    extra_body={\n${own.map(([name, value]) => `        "${name}": ${literal(value)},\n`).join("")}    },\n`);
  }
  return `import os\n\nfrom openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}${ROOT}/v1", `
    + `api_key=os.environ.get("API_KEY", "none"))\nreply = ${call}(\n${lines.join("")})\n`
    + `for choice in reply.choices:\n    print(${text}${readout ? ", choice.readout" : ""})\n`;
}
