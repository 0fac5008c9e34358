"use strict";
// Directions that the page registers on the server, with its admin key: files that are dropped, and random controls.

const FORMATS = {
  safetensors: { ends: [".safetensors"] }, gguf: { ends: [".gguf"] }, svec: { ends: [".svec"] }, brainpatch: { ends: [".brainpatch"] },
  pt: { ends: [".pt", ".pth", ".bin"], asks: true }, npy: { ends: [".npy"], asks: true }, float32: { ends: [".f32", ".raw"], asks: true },
};
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

  take(file) {
    if (!file) return;
    this.file = file;
    const { name, format } = this.form.elements;
    byId("file-name").textContent = `${file.name}, ${file.size} bytes`;
    name.value = nameFrom(file.name);
    format.value = formatOf(file.name) ?? "safetensors";
    this.explain();
    name.focus();
  }

  explain() {
    const { format, layer, layer_index: index } = this.form.elements;
    byId("register-why").textContent = format.value === "float32" ? "Such a file is one vector of float32 little-endian numbers: give its layer."
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
    try {
      const listed = await putDirection(name.value, await this.file.arrayBuffer(), {
        layer: layer.value, ...(isRaw ? {} : { format: format.value, layer_index: index.value }),
      });
      this.dialog.close();
      await this.onRegistered(`Registered ${listed.map((one) => `${one.name} at layer ${one.layer}, length ${shown(one.norm)}`).join("; ")}.`);
    } catch (error) {
      this.refuse(error);
    }
  }

  refuse(error) {
    const { layer, layer_index: index, admin } = this.form.elements;
    if (error.status === 401 || error.status === 403) keys.admin = null;
    this.tell(error.message);
    const asked = error.status === 401 || error.status === 403 ? admin : error.message.includes("layer_index") ? index : error.message.includes("layer=") ? layer : undefined;
    asked?.focus();
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
