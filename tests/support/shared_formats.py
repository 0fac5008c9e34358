"""Files that other packages really wrote, and what `load_directions` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vllm_steer.directions import load_directions
from vllm_steer.errors import BadDirectionFile

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "direction-files.md"
BEGIN, END = "<!-- made by python -m tests.support.shared_formats -->\n\n", "\n<!-- end -->"
FORMATS = Path(__file__).resolve().parents[3] / "shared" / "formats"


class Sample(NamedTuple):
    """One file or folder.

    Attributes:
        path: below the folder of samples.
        writer: the package that wrote it.
        arguments: of `load_directions`.
        keys: of the directions that it holds, in order; none if it is refused.
        refused: part of the refusal.
    """

    path: str
    writer: str
    arguments: dict[str, Any]
    keys: tuple[str, ...] = ()
    refused: str = ""


PROBE = "concept_probes/cat/google_gemma-3-27b-it/layer_3"
SAMPLES = (
    Sample("repeng.gguf", "repeng 0.4.0", {}, ("repeng@1", "repeng@2", "repeng@3")),
    Sample("repeng_scaled_np64.gguf", "repeng 0.4.0, scaled", {"name": "cat"}, ("cat@1", "cat@2", "cat@3")),
    Sample("dialz.gguf", "dialz 1.1.4", {}, ("dialz@1", "dialz@2", "dialz@3")),
    Sample("easysteer.gguf", "EasySteer", {}, ("easysteer@0", "easysteer@1", "easysteer@2", "easysteer@3")),
    Sample("saklas.gguf", "saklas 5.3.0", {}, ("saklas@0", "saklas@1")),
    Sample("saklas_profile.safetensors", "saklas 5.3.0", {}, ("saklas_profile@1", "saklas_profile@2")),
    Sample("brainpatch.gguf", "brainpatch 1.2.0", {}, refused="layer_index='hidden_states' for brainpatch"),
    Sample("brainpatch.gguf", "brainpatch 1.2.0", {"layer_index": "hidden_states"}, ("brainpatch@2",)),
    Sample("glp_like.gguf", "GLP", {}, refused="op='ablate'"),
    Sample(
        "steerkit.probe.safetensors",
        "steerkit 0.3.0",
        {},
        ("steerkit.diff_of_means@2", "steerkit.logistic@2", "steerkit.mass_mean@2"),
    ),
    Sample("hidden_directions.pt", "hidden-directions 0.1.6", {}, refused="does not say how it counts layers"),
    Sample(
        "hidden_directions.pt",
        "hidden-directions 0.1.6",
        {"layer_index": "block_output", "name": "cat"},
        ("cat@1", "cat@2"),
    ),
    Sample("lm_eval_steered.pt", "lm-eval 0.4.13", {}, ("lm_eval_steered@2",)),
    Sample("ibm_cast.svec", "activation-steering", {}, tuple(f"ibm_cast@{layer}" for layer in range(4))),
    Sample("steering_vectors.pt", "steering-vectors 0.12.2", {}, refused="only running code"),
    Sample(PROBE, "concept-probes 0.1.0", {}, ("cat@2",)),
    Sample(f"{PROBE}/weights.npy", "concept-probes 0.1.0", {}, ("cat@2",)),
    Sample("sae_lens", "sae-lens 6.54", {}, refused="feature=..."),
    Sample("sae_lens", "sae-lens 6.54", {"feature": 3, "name": "cat"}, ("cat@2",)),
)


def table() -> str:
    """The table of the documentation: what `load_directions` makes of each sample."""
    lines = ["| file | written by | arguments | directions |", "|---|---|---|---|"]
    for sample in SAMPLES:
        arguments = ", ".join(f"`{name}={value!r}`" for name, value in sample.arguments.items())
        try:
            found = load_directions(FORMATS / sample.path, **sample.arguments)
            result = ", ".join(f"`{one.key}`" for one in found)
        except BadDirectionFile as error:
            said = " ".join(str(error).replace(f"{FORMATS}/", "").split(";")[0].split()[1:])
            result = f"refused: it {said}"
        lines.append(f"| `{Path(sample.path).name}` | {sample.writer} | {arguments} | {result} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
