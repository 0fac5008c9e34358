"""Tiny random checkpoints with a vision tower, with all that vLLM and transformers need to read pictures; and pictures.

The tokenizer is the tiny models': special tokens that no prompt has take the names of those that stand for pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.support.tiny_configs import Fields
from tests.support.tiny_models import save_tiny_model

FIRST_SPECIAL = 3  # id of a wrapper's first token; the demo model's special tokens 3 to 16 stand in no prompt
INIT_STD = 0.15  # of towers, too: their pictures must matter

# PICTURE is what stands for one, in its place between the words.
_CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Wrapper:
    """How a tiny model of one architecture sees.

    Attributes:
        picture: what stands for a picture in a prompt.
        tokens: the special tokens for pictures; the first stands at every place of what the tower sees.
        ids: field of the config -> the special token whose id it is.
        processor: makes the processor from the tokenizer.
        fields: of the config, over those of the architecture's row.
        renamed: beginning of a weight's name as transformers writes it -> as released checkpoints and vLLM have it.
        named: the tokenizer's own names of special tokens.
        without: inputs of the processor that vLLM on a CPU takes no notice of.
    """

    picture: str
    tokens: tuple[str, ...]
    ids: dict[str, str]
    processor: Callable[[Any], Any]
    fields: Fields
    renamed: dict[str, str] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def _llava(tokenizer: Any) -> Any:
    pixels = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _llava_next(tokenizer: Any) -> Any:
    grids = {"image_grid_pinpoints": [[56, 112], [112, 56]]}
    pixels = LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, **grids)
    return LlavaNextProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _gemma3(tokenizer: Any) -> Any:
    return Gemma3Processor(Gemma3ImageProcessor(size={"height": 56, "width": 56}), tokenizer, image_seq_length=4)


def _internvl(tokenizer: Any) -> Any:
    pixels = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2)
    videos = InternVLVideoProcessor(size={"height": 56, "width": 56})
    return InternVLProcessor(pixels, tokenizer, videos, image_seq_length=4)


def _idefics3(tokenizer: Any) -> Any:
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    return Idefics3Processor(Idefics3ImageProcessor(**sizes), tokenizer, image_seq_len=4)


def _mistral3(tokenizer: Any) -> Any:
    pixels = PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return PixtralProcessor(pixels, tokenizer, patch_size=14, spatial_merge_size=2)


def _qwen2_vl(tokenizer: Any) -> Any:
    size = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    return Qwen2VLProcessor(Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size))


def _qwen2_5_vl(tokenizer: Any) -> Any:
    size = {"shortest_edge": 28 * 28, "longest_edge": 16 * 28 * 28}
    return Qwen2_5_VLProcessor(Qwen2VLImageProcessor(size=size), tokenizer, Qwen2VLVideoProcessor(size=size))


def _qwen3_vl(tokenizer: Any) -> Any:
    sizes: Fields = {"size": {"shortest_edge": 32 * 32, "longest_edge": 16 * 32 * 32}, "patch_size": 16}
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(**sizes))


_ROPE: Fields = {"rope_type": "default", "rope_theta": 10000.0}
_TOWER_AS_RELEASED = {"vision_tower.": "vision_tower.vision_model."}
_IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
_QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_QWEN: dict[str, Any] = {
    "picture": "<|vision_start|><|image_pad|><|vision_end|>",
    "tokens": _QWEN_TOKENS,
    "ids": {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
}
WRAPPERS: dict[str, Wrapper] = {
    "LlavaForConditionalGeneration": Wrapper(
        "<image>",
        ("<image>",),
        {"image_token_index": "<image>"},
        _llava,
        {},
        renamed=_TOWER_AS_RELEASED,
    ),
    "LlavaNextForConditionalGeneration": Wrapper(
        "<image>",
        ("<image>",),
        {"image_token_index": "<image>"},
        _llava_next,
        {"image_grid_pinpoints": [[56, 112], [112, 56]]},
        renamed=_TOWER_AS_RELEASED,
    ),
    "Qwen2VLForConditionalGeneration": Wrapper(
        processor=_qwen2_vl, fields={"vision_config": {"embed_dim": 64, "hidden_size": 128}}, **_QWEN
    ),
    "Qwen2_5_VLForConditionalGeneration": Wrapper(
        processor=_qwen2_5_vl,
        fields={"vision_config": {"fullatt_block_indexes": [1], "window_size": 56}},
        **_QWEN,
    ),
    "Qwen3VLForConditionalGeneration": Wrapper(
        processor=_qwen3_vl,
        fields={
            "vision_config": {"deepstack_visual_indexes": [0, 1]},
            # As released: the rotations of the three kinds of position take turns.
            "text_config": {"rope_parameters": {"mrope_section": [6, 5, 5], "mrope_interleaved": True} | _ROPE},
        },
        **_QWEN,
    ),
    "Mistral3ForConditionalGeneration": Wrapper(
        "[IMG]",
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        {"image_token_index": "[IMG]"},
        _mistral3,
        {"vision_config": {"patch_size": 14, "image_size": 112}},
    ),
    "Idefics3ForConditionalGeneration": Wrapper(
        "<image>",
        _IDEFICS_TOKENS,
        {"image_token_id": "<image>"},
        _idefics3,
        {"vision_config": {"patch_size": 14}},
    ),
    "Gemma3ForConditionalGeneration": Wrapper(
        "<start_of_image>",
        # vLLM asks for the words of so many new lines, which surround a picture, by their text.
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>", *("\n" * count for count in (1, 2, 3, 4))),
        {
            "image_token_index": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        _gemma3,
        {"mm_tokens_per_image": 4, "vision_config": {"patch_size": 14}},
        named={"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"},
        renamed=_TOWER_AS_RELEASED,
        # Its attention sees a whole picture from each of its places; vLLM's on a CPU is causal there, too.
        without=("token_type_ids",),
    ),
    "InternVLForConditionalGeneration": Wrapper(
        "<IMG_CONTEXT>",
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        {"image_token_id": "<IMG_CONTEXT>"},
        _internvl,
        {"image_seq_length": 4, "vision_config": {"image_size": [56, 56], "patch_size": [14, 14]}},
        named={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    ),
}


def save_tiny_wrapper(family: str, tokenizer_dir: Path, target: Path) -> Path:
    """Write a random checkpoint of `family`, a name in `WRAPPERS`, with its tower, processor and chat template.

    The text model is that of `save_tiny_model`, so steering is as strong in it.

    Returns:
        `target`.
    """
    wrapper = WRAPPERS[family]
    ids = {name: FIRST_SPECIAL + wrapper.tokens.index(token) for name, token in wrapper.ids.items()}
    tower = {"vision_config": {"initializer_range": INIT_STD} | wrapper.fields.get("vision_config", {})}
    save_tiny_model(family, tokenizer_dir, target, changes=wrapper.fields | ids | tower)
    _finish_weights(target / "model.safetensors", wrapper.renamed)
    _rename_special_tokens(target / "tokenizer.json", wrapper.tokens)
    (target / "chat_template.jinja").write_text(_CHAT_TEMPLATE.replace("PICTURE", wrapper.picture), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(target, extra_special_tokens=wrapper.named)
    wrapper.processor(tokenizer).save_pretrained(target)
    return target


def _finish_weights(file: Path, renamed: dict[str, str]) -> None:
    """Rename weights, and give random values to matrices that transformers leaves at zero."""
    random = torch.Generator().manual_seed(1)
    weights = load_file(file)
    for name, one in weights.items():
        if one.ndim > 1 and not one.any():
            weights[name] = INIT_STD * torch.randn(one.shape, generator=random)
    for old, new in renamed.items():
        weights = {new + name[len(old) :] if name.startswith(old) else name: one for name, one in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _rename_special_tokens(file: Path, names: Sequence[str]) -> None:
    whole = json.loads(file.read_text(encoding="utf-8"))
    renamed = dict(enumerate(names, FIRST_SPECIAL))
    for token in whole["added_tokens"]:
        token["content"] = renamed.get(token["id"], token["content"])
    vocab = whole["model"]["vocab"]
    whole["model"]["vocab"] = {renamed.get(token, word): token for word, token in vocab.items()}
    file.write_text(json.dumps(whole), encoding="utf-8")


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A picture of random coloured squares."""
    colours = np.random.default_rng(seed).integers(0, 256, size=(height // 7, width // 7, 3), dtype=np.uint8)
    return Image.fromarray(colours.repeat(7, axis=0).repeat(7, axis=1))


def processed(
    family: str, model: Path, text: str, pictures: Sequence[Image.Image]
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """What transformers' processor makes of a prompt: its ids, and what else `Reference.show` takes."""
    inputs = dict(AutoProcessor.from_pretrained(model)(images=list(pictures) or None, text=text, return_tensors="pt"))
    ids: list[int] = inputs.pop("input_ids")[0].tolist()
    dropped = {"attention_mask", *WRAPPERS[family].without}
    return ids, {name: one for name, one in inputs.items() if name not in dropped} if pictures else {}
