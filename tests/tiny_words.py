"""Tiny random checkpoints of every family that the labelers `clip` and `caption` take, saved as a user would have them.

Sides are 32 pixels, widths 32, vocabularies a few dozen words; real classes, real processors, real tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIDE, PATCH, WIDTH = 32, 8, 32
WORDS = """a the red green blue sphere cone box cylinder on floor and with large small what is in this picture describe
detail more than one paragraph short sentence caption does image user assistant en . , : ?"""
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_LANGUAGE = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant : {% endif %}"
)


def tokenizer(special: list[str], around: str | None = None, size: int = 0, **names: Any) -> Any:
    """Whole words to ids, `special` first; `around` is a template such as '[CLS] $A [SEP]'; at least `size` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = list(dict.fromkeys([*special, *WORDS.split()]))
    ids = {word: number for number, word in enumerate([*words, *(f"w{i}" for i in range(len(words), size))])}
    made = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if around:
        marks = [(word, ids[word]) for word in around.split() if word in ids]
        made.post_processor = processors.TemplateProcessing(single=around, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **names)


def bert_tokenizer(size: int = 0) -> Any:
    """Ids of [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, as BLIP and GIT want them around a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return tokenizer(special, "[CLS] $A [SEP]", size, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def opt_tokenizer(*more: str, **names: Any) -> Any:
    """Ids of <s> 0, <pad> 1, </s> 2, [UNK] 3, and `more` special ones."""
    special = ["<s>", "<pad>", "</s>", "[UNK]", *more]
    return tokenizer(special, bos_token="<s>", pad_token="<pad>", eos_token="</s>", **names)


def square(kind: str, **options: Any) -> Any:
    """A transformers image processor whose pictures are SIDE pixels."""
    import transformers

    return getattr(transformers, kind)(size={"height": SIDE, "width": SIDE}, **options)


def _clip_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def _save(folder: Path, *parts: Any) -> Path:
    from transformers.utils import logging

    logging.disable_progress_bar()
    for part in parts:
        part.save_pretrained(folder)
    return folder


# CLIP


def save_open_clip(folder: Path, **config: Any) -> Path:
    """open_clip's own vision transformer; `config` overrides parts of model_cfg."""
    import open_clip

    vision = {"image_size": SIDE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": PATCH, "mlp_ratio": 2.0}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, **config}
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    text_config = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(text_config), encoding="utf-8")
    return folder


def save_open_clip_resnet(folder: Path) -> Path:
    vision = {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 16}
    return save_open_clip(folder, vision_cfg=vision)


def save_transformers_clip(folder: Path, act: str = "quick_gelu", **vision: Any) -> Path:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {**_LANGUAGE, "vocab_size": 16, "max_position_embeddings": 8, "hidden_act": act}
    config = CLIPConfig(
        text_config=text, vision_config={**_VISION, "hidden_act": act, **vision}, projection_dim=24,
    )  # fmt: skip
    return _save(folder, CLIPModel(config), _clip_processor())


def save_clip_vision(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(**_VISION, projection_dim=24)
    return _save(folder, CLIPVisionModelWithProjection(config), _clip_processor())


def save_siglip(folder: Path) -> Path:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {**_LANGUAGE, "vocab_size": 16, "max_position_embeddings": 8}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_VISION))
    return _save(folder, model, square("SiglipImageProcessor"))


# Captions


def save_blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

    torch.manual_seed(0)
    words = bert_tokenizer()
    text = {**_LANGUAGE, "vocab_size": len(words), "encoder_hidden_size": WIDTH, "max_position_embeddings": 64}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(text_config=text, vision_config=_VISION, image_text_hidden_size=WIDTH)
    return _save(folder, BlipForConditionalGeneration(config), BlipProcessor(square("BlipImageProcessor"), words))


def save_blip2(folder: Path) -> Path:
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor

    torch.manual_seed(0)
    words = opt_tokenizer()
    processor = Blip2Processor(square("BlipImageProcessor"), words, num_query_tokens=4)  # adds <image> to `words`
    text = {
        "model_type": "opt",
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "ffn_dim": 64,
        "word_embed_proj_dim": WIDTH,
    }
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = Blip2Config(
        vision_config=_VISION,
        qformer_config={**_LANGUAGE, "vocab_size": 8, "encoder_hidden_size": WIDTH, "cross_attention_frequency": 1},
        text_config={**text, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return _save(folder, Blip2ForConditionalGeneration(config), processor)


def save_git(folder: Path) -> Path:
    from transformers import GitConfig, GitForCausalLM, GitProcessor

    torch.manual_seed(0)
    words = bert_tokenizer()
    config = GitConfig(
        vision_config=_VISION, **_LANGUAGE, vocab_size=len(words), max_position_embeddings=64,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return _save(folder, GitForCausalLM(config), GitProcessor(_clip_processor(), words))


def save_florence2(folder: Path) -> Path:
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

    torch.manual_seed(0)
    words = opt_tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [16, WIDTH], "num_heads": [2, 2], "num_groups": [2, 2],
        "window_size": 4, "projection_dim": WIDTH, "max_position_embeddings": 8, "max_temporal_embeddings": 2,
    }  # fmt: skip
    text = {
        "model_type": "bart", "vocab_size": len(words), "d_model": WIDTH, "max_position_embeddings": 128,
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    }  # fmt: skip
    image_id = words.convert_tokens_to_ids("<image>")
    model = Florence2ForConditionalGeneration(
        Florence2Config(vision_config=vision, text_config=text, image_token_id=image_id)
    )
    # 32 pixels in patches of 4 x 2: 16 places, and their mean
    images = square("CLIPImageProcessor", do_center_crop=False, image_seq_length=17)
    return _save(folder, model, Florence2Processor(images, words, post_processor_config={"pure_text": {}}))


def save_paligemma(folder: Path) -> Path:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

    torch.manual_seed(0)
    words = opt_tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    processor = PaliGemmaProcessor(square("SiglipImageProcessor", image_seq_length=16), words)  # adds 1,152 tokens
    text = {**_LANGUAGE, "model_type": "gemma", "vocab_size": len(words), "num_key_value_heads": 1, "head_dim": 16}
    vision = {**_VISION, "model_type": "siglip_vision_model", "projection_dim": WIDTH, "vision_use_head": False}
    config = PaliGemmaConfig(
        vision_config=vision,
        text_config={**text, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        image_token_index=words.convert_tokens_to_ids("<image>"), projection_dim=WIDTH,
    )  # fmt: skip
    return _save(folder, PaliGemmaForConditionalGeneration(config), processor)


def save_llava(folder: Path) -> Path:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(0)
    words = opt_tokenizer("<image>", extra_special_tokens={"image_token": "<image>"})
    text = {**_LANGUAGE, "model_type": "llama", "vocab_size": len(words), "max_position_embeddings": 128}
    config = LlavaConfig(
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        text_config={**text, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        image_token_index=words.convert_tokens_to_ids("<image>"), vision_feature_layer=-1, image_seq_length=16,
    )  # fmt: skip
    processor = LlavaProcessor(
        _clip_processor(), words, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=_CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return _save(folder, LlavaForConditionalGeneration(config), processor)


def save_qwen2_vl(folder: Path) -> Path:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    torch.manual_seed(0)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = opt_tokenizer(*marks, additional_special_tokens=marks)
    ids = dict(zip(marks, words.convert_tokens_to_ids(marks), strict=True))
    text = {**_LANGUAGE, "vocab_size": len(words), "num_key_value_heads": 2, "max_position_embeddings": 512}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "patch_size": PATCH},
        text_config={**text, "rope_parameters": rope, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    limits = {"size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE * 4}, "patch_size": PATCH}
    template = _CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**limits), words, Qwen2VLVideoProcessor(**limits), chat_template=template
    )
    return _save(folder, Qwen2VLForConditionalGeneration(config), processor)


def save_idefics3(folder: Path) -> Path:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    torch.manual_seed(0)
    words = opt_tokenizer("<image>")
    limits = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    template = _CHAT.replace("IMAGE", "<image>")
    processor = Idefics3Processor(Idefics3ImageProcessor(**limits), words, image_seq_len=4, chat_template=template)
    text = {**_LANGUAGE, "model_type": "llama", "vocab_size": len(words), "max_position_embeddings": 256}
    config = Idefics3Config(
        vision_config=_VISION, text_config={**text, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=1,
    )  # fmt: skip
    return _save(folder, Idefics3ForConditionalGeneration(config), processor)


SAVERS: dict[str, Callable[[Path], Path]] = {
    "open_clip": save_open_clip,
    "open_clip_resnet": save_open_clip_resnet,
    "transformers_clip": save_transformers_clip,
    "clip_vision": save_clip_vision,
    "siglip": save_siglip,
    "blip": save_blip,
    "blip2": save_blip2,
    "git": save_git,
    "florence2": save_florence2,
    "paligemma": save_paligemma,
    "llava": save_llava,
    "qwen2_vl": save_qwen2_vl,
    "idefics3": save_idefics3,
}
CAPTIONERS = ("blip", "blip2", "git", "florence2", "paligemma", "llava", "qwen2_vl", "idefics3")


# Networks that know two pictures

LESSONS = {0: "red cone", 255: "the blue box"}  # brightness of the whole picture -> what to say of it
QUESTION = "what is this ?"


def teach(family: str, folder: Path, steps: int = 100) -> Path:
    """Train a tiny captioner to say LESSONS, in a second or two, and save it in place."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    SAVERS[family](folder)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()  # no dropout
    inputs = _lesson(family, AutoProcessor.from_pretrained(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1, f"{family} did not learn its lesson: loss {loss.item():.2f}"
    return _save(folder, model)


def _lesson(family: str, processor: Any) -> dict[str, Any]:
    """A training batch: both pictures, what is asked, what is to be said."""
    images = [torch.full((3, 48, 48), value, dtype=torch.uint8) for value in LESSONS]
    said = list(LESSONS.values())
    options = {"return_tensors": "pt", "padding": True}
    if family in ("blip", "git"):
        inputs = processor(images=images, text=said, **options)
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    answers = processor.tokenizer([f"{text} </s>" for text in said], **options)
    labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
    if family == "florence2":
        return {**processor(images=images, text=["<CAPTION>"] * 2, **options), "labels": labels}
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[[i] for i in images], text=[f"{asked}{text} </s>" for text in said], **options)
    asked_labels = torch.full((2, inputs["input_ids"].shape[1] - labels.shape[1]), -100)
    return {**inputs, "labels": torch.cat([asked_labels, labels], dim=1)}
