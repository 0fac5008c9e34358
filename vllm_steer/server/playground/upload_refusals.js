"use strict";
// What the server says of a file that it refuses, in terms of the dialog's fields. The server speaks to programs.

const REFUSALS = [
  [/holds one vector and no layer/, "layer", () => "The file holds one vector and does not say of which layer. Give its layer in “Layer”."],
  [/stores neither name nor layer/, "layer", () => "A .npy file does not say its layer. Give it in “Layer”; or, if the file has one vector a layer, choose “Layers counted”."],
  [/does not say how it counts layers/, "layer_index",
    () => "The file does not say how it counts layers. Choose it in “Layers counted”: by block output if number 0 is the first block, as hidden states if it is the embeddings."],
  [/has the model hint 'unknown'/, "layer_index", () => "The file does not say for which model it is, and its writers count layers in two ways. Choose one in “Layers counted”: as hidden states if brainpatch wrote it, else by block output."],
  [/has a tensor named (.+?); allowed: name@layer/, "layer",
    ([, name]) => `The file has a tensor named ${name}, which says no layer. If it is one vector, give its layer in “Layer”; if it is one vector a layer, choose “Layers counted”.`],
  [/has (\d+) rows, got layer (\d+)/, "layer", ([, rows, layer]) => `The file has ${counted(Number(rows), "layer")}, none of them ${layer}. Correct “Layer”.`],
  [/holds no direction of layer (\d+)/, "layer", ([, layer]) => `The file has no direction of layer ${layer}. Correct “Layer”, or leave it empty for all that the file has.`],
  [/holds the names (\[.+?\]?), got one name for them/, "name", ([, names]) => `The file has several names: ${names}. Leave “Name” empty; each direction is then registered under its own name.`],
  [/direction name is (.+?); allowed: (.+?) Rename it\./, "name", ([, name, allowed]) => `The name ${name} cannot be used; allowed: ${allowed} Give another one in “Name”.`],
  [/has (\d+) bytes; allowed: whole float32 numbers/, "format", ([, bytes]) => `The file has ${bytes} bytes, which are no whole float32 numbers of 4 bytes. Choose its format in “Format”.`],
  [/is not (a )?readable/, "format", (_, message) => `${message} If it is of another format, choose that in “Format”.`],
  [/X-Admin-Key/, "admin", () => "That is not this server's admin key. Give the right one in “Admin key”."],
];
const QUOTED_CODE = / ?\((?:tensor\.float\(\) in PyTorch|vllm-steer convert [^)]*)\)/g;

/** {text, field}: the refusal for the dialog, and the name of the field that it is about, if it is about one. */
function refusalOf(message) {
  const plain = message.replaceAll("the upload", "the file").replace(QUOTED_CODE, "").replace(/^./, (sign) => sign.toUpperCase());
  for (const [pattern, field, words] of REFUSALS) {
    const found = pattern.exec(plain);
    if (found) return { text: words(found, plain), field };
  }
  return { text: plain, field: undefined };
}
