"use strict";
// Directions that the page registers on the server, with its admin key: files that are dropped, and random controls.

const FORMATS = {
  safetensors: { ends: [".safetensors"] }, gguf: { ends: [".gguf"] }, svec: { ends: [".svec"] }, brainpatch: { ends: [".brainpatch"] },
  pt: { ends: [".pt", ".pth", ".bin"], asks: true }, npy: { ends: [".npy"], asks: true }, float32: { ends: [".f32", ".raw"], asks: true },
};
const MOST_HEADER = 4 << 20; // bytes of a file in which its names are looked for
const RANDOM = "random-";

const formatOf = (fileName) => Object.keys(FORMATS).find((name) => FORMATS[name].ends.some((end) => fileName.toLowerCase().endsWith(end)));

/** A name that the server takes, from that of a file. */
const nameFrom = (fileName) => fileName.replace(/(\.[A-Za-z0-9]+)$/, "").replace(/[^A-Za-z0-9._:/+-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);

class RegisterDialog {
  /** `onRegistered(text)` follows every change at the server. */
  constructor(onRegistered) {
    this.dialog = byId("register");
    this.form = this.dialog.querySelector("form");
    this.onRegistered = onRegistered;
    this.form.elements.file.addEventListener("change", ({ target }) => this.take(target.files[0]));
    this.names = []; // of a file with several
    this.form.elements.format.addEventListener("change", () => this.explain());
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    byId("register-close").addEventListener("click", () => this.dialog.close());
    for (const type of ["dragover", "drop"]) {
      document.addEventListener(type, (event) => {
        if (![...event.dataTransfer.types].includes("Files")) return;
        event.preventDefault();
        if (type === "drop") { this.open(); this.take(event.dataTransfer.files[0]); }
      });
    }
  }

  open() {
    this.tell(server.changes ? "" : "This server was started without VLLM_STEER_ADMIN_KEY, so its directions cannot be changed.");
    this.form.elements.admin.value = keys.admin ?? "";
    if (!this.dialog.open) this.dialog.showModal();
    this.explain();
  }

  async take(file) {
    if (!file) return;
    this.file = file;
    const { name, format } = this.form.elements;
    byId("file-name").textContent = `${file.name}, ${counted(file.size, "byte")}`;
    format.value = formatOf(file.name) ?? "safetensors";
    this.names = [];
    name.value = nameFrom(file.name);
    this.explain();
    name.focus();
    const names = namesIn(await file.slice(0, MOST_HEADER).arrayBuffer());
    if (this.file !== file || names.length < 2) return; // or another one has been chosen meanwhile
    this.names = names;
    name.value = "";
    this.explain();
  }

  /** The file's several names, where the format is theirs. */
  get ownNames() { return this.form.elements.format.value === "safetensors" ? this.names : []; }

  explain() {
    const { name, format, layer, layer_index: index } = this.form.elements;
    name.required = this.ownNames.length === 0;
    name.placeholder = name.required ? "" : "as the file says";
    byId("register-why").textContent = this.ownNames.length
      ? `The file has ${this.ownNames.length} names: ${this.ownNames.join(", ")}. With “Name” empty, each direction is registered under its own.`
      : format.value === "float32" ? "Such a file is one vector of float32 little-endian numbers: give its layer."
        : FORMATS[format.value].asks ? "Many such files do not say which layer they are for, or how they count layers: give what the server asks for."
          : "The file itself says which layers it is for.";
    layer.required = format.value === "float32";
    index.disabled = format.value === "float32";
  }

  tell(text) {
    byId("register-told").textContent = text;
    byId("register-told").hidden = !text;
  }

  async send() {
    const { name, format, layer, layer_index: index, admin } = this.form.elements;
    if (!this.file) return this.tell("No file has been chosen. Choose one, or drop one on the page.");
    keys.admin = admin.value;
    const isRaw = format.value === "float32";
    const listed = [];
    try {
      const content = await this.file.arrayBuffer();
      const fields = { layer: layer.value, ...(isRaw ? {} : { format: format.value, layer_index: index.value }) };
      // the server takes one name at a time
      for (const own of name.value === "" ? this.ownNames : []) listed.push(...await putDirection(own, partOf(content, own), fields));
      if (name.value !== "") listed.push(...await putDirection(name.value, content, fields));
      this.dialog.close();
      await this.onRegistered(`Registered ${listed.map((one) => `${one.name} at layer ${one.layer}, length ${shown(one.norm)}`).join("; ")}.`);
    } catch (error) {
      if (error.status === 401 || error.status === 403) keys.admin = null;
      const { text, field } = refusalOf(error.message);
      const done = [...new Set(listed.map((one) => one.name))].join(", ");
      this.tell(done ? `${done} ${done.includes(",") ? "are" : "is"} registered, the rest not: ${text}` : text);
      this.form.elements[field]?.focus();
      if (done) await this.onRegistered(`Registered ${done}.`);
    }
  }
}

/** `count` numbers of a normal distribution: mulberry32 for uniform ones, Box and Muller for the rest. */
function normals(seed, count) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6D2B79F5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  return Float64Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);

/**
 * Registers a random direction of the length of `name` at `layer`, always the same for a seed.
 * Resolves to {name, listed, cosine}, the cosine that it has with the direction by chance.
 */
async function registerRandom(name, layer, seed) {
  const like = await vectorOf(name, layer);
  const drawn = normals(seed, like.length);
  const [length, size] = [Math.sqrt(dot(like, like)), Math.sqrt(dot(drawn, drawn))];
  const vector = Float32Array.from(drawn, (value) => (value / size) * length);
  const bytes = new DataView(new ArrayBuffer(4 * vector.length));
  vector.forEach((value, index) => bytes.setFloat32(4 * index, value, true));
  const called = `${RANDOM}${seed}-${name}`.slice(0, 128);
  const listed = await putDirection(called, bytes.buffer, { layer });
  return { name: called, listed, cosine: dot(like, vector) / length ** 2 };
}
