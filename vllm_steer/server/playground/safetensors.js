"use strict";
// Files of safetensors: which names they have, and the part of one name.

/** {header, start}: the header as an object and where the tensors begin; undefined if the bytes are no such file. */
function safetensorsIn(buffer) {
  try {
    const start = 8 + Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, start - 8)));
    return header !== null && typeof header === "object" ? { header, start } : undefined;
  } catch { // too short, or no JSON: the server says what is wrong with it
    return undefined;
  }
}

const nameIn = (key) => key.slice(0, key.lastIndexOf("@"));

/** The names of the directions, where all tensors are called name@layer; else none. */
function namesIn(buffer) {
  const keys = Object.keys(safetensorsIn(buffer)?.header ?? {}).filter((key) => key !== "__metadata__");
  return keys.every((key) => /.@\d+$/.test(key)) ? [...new Set(keys.map(nameIn))].sort() : [];
}

/** A file with the directions of `name` alone, and the metadata of all. */
function partOf(buffer, name) {
  const { header, start } = safetensorsIn(buffer);
  const pieces = [];
  const kept = {};
  let size = 0;
  for (const [key, about] of Object.entries(header)) {
    if (key === "__metadata__") kept[key] = about;
    if (key === "__metadata__" || nameIn(key) !== name) continue;
    const [from, to] = about.data_offsets;
    kept[key] = { ...about, data_offsets: [size, size + to - from] };
    pieces.push(new Uint8Array(buffer, start + from, to - from));
    size += to - from;
  }
  const text = new TextEncoder().encode(JSON.stringify(kept));
  const made = new Uint8Array(8 + text.length + size);
  new DataView(made.buffer).setBigUint64(0, BigInt(text.length), true);
  made.set(text, 8);
  pieces.reduce((at, piece) => { made.set(piece, at); return at + piece.length; }, 8 + text.length);
  return made.buffer;
}
