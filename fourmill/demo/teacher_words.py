"""Demo teachers of words: CLIP and captions, each with a tokenizer of the scenes' own vocabulary.

Shape legend: B batch, S side of the picture (128), L tokens, C channels.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fourmill.demo.teacher_figures import Figures, caption_figures, retrieval_figures
from fourmill.demo.teacher_parts import (
    HALF,
    SIZE,
    Flip,
    Rows,
    all_rows,
    load_half,
    mirrored,
    patch_class_loss,
    pixels,
    save_half,
)
from fourmill.scenes import CLASSES
from fourmill.scenes.cache import SceneCache

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CLS, _SEP = 2, 3
_EMBED = 128  # channels of the CLIP space
_TEXT = 48  # the longest of 32,000 captions has 43 tokens


def _tokenizer(texts: list[str], length: int) -> Any:
    """A WordPiece tokenizer whose vocabulary is every word of `texts`: about 60, so no word is ever split."""
    from transformers import BertTokenizer

    words = sorted({word for text in texts for word in text.replace(",", " , ").split()})
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *words))}
    return BertTokenizer(vocab=vocabulary, model_max_length=length)


def _token_ids(tokenizer: Any, texts: list[str], length: int) -> torch.Tensor:
    """(N, L) int64, padded."""
    found = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return found["input_ids"]


def mirror_words(caption: str) -> str:
    """The caption of the mirrored picture: left and right change places, nothing else depends on the side."""
    return " ".join({"left": "right", "right": "left"}.get(word, word) for word in caption.split(" "))


class ClipTask:
    """open_clip with a ViT over 16 x 16 patches (8 x 8 grid) and a causal text transformer; InfoNCE."""

    name, watched, size, rate = "clip", "image_to_text_r1", 128, 2e-3

    def __init__(self, cache: SceneCache) -> None:
        import open_clip

        self.tokenizer = _tokenizer(cache.captions, _TEXT)
        self.config = {
            "embed_dim": _EMBED,
            "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 160, "head_width": 40, "patch_size": 16,
                           "mlp_ratio": 3.0},
            "text_cfg": {"context_length": _TEXT, "vocab_size": len(self.tokenizer), "width": 128, "heads": 4,
                         "layers": 2, "pool_type": "eos", "eos_id": _SEP, "pad_id": 0,
                         "hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"clean": "whitespace"}},
        }  # fmt: skip
        self.model = open_clip.CLIP(**self.config)
        self._words = dict[int, tuple[torch.Tensor, torch.Tensor]]()

    def _ids(self, cache: SceneCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of the captions and of their mirror images, made once a cache."""
        if id(cache) not in self._words:
            sides = (cache.captions, [mirror_words(caption) for caption in cache.captions])
            plain, mirrored = (_token_ids(self.tokenizer, texts, _TEXT) for texts in sides)
            self._words[id(cache)] = (plain, mirrored)
        return self._words[id(cache)]

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        plain, mirrored = self._ids(cache)
        ids = torch.where(torch.from_numpy(flip)[:, None], mirrored[rows], plain[rows])
        images, texts, scale = self.model(pixels(cache, rows, flip), ids)
        logits = scale.clamp(max=100) * images.float() @ texts.float().T
        target = torch.arange(len(rows))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        images = torch.cat([self.model.encode_image(pixels(cache, *batch)) for batch in all_rows(cache)])
        figures = retrieval_figures(images.float(), self.model.encode_text(self._ids(cache)[0]).float())
        return figures["image_to_text_r1"] + figures["text_to_image_r1"], figures

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.half().contiguous() for name, weight in self.model.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        preprocess = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
        config = {"model_cfg": self.config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        weights = load_file(folder / "open_clip_model.safetensors")
        self.model.load_state_dict({name: weight.float() for name, weight in weights.items()})


def mirror_summary(text: str) -> str:
    """The summary of the mirrored picture: its objects in the opposite order."""
    things, room = text.split(" on a ", 1)
    parts = re.split("(, | and )", things)
    parts[::2] = parts[-1::-2]
    return "".join(parts) + " on a " + room


class CaptionTask:
    """BLIP over 8 x 8 patches with a two-layer decoder; cross-entropy on the plain `summary` of a scene.

    While training, a linear head on the patch tokens also names the classes at 4 x 4 points of each patch: words alone
    teach the vision tower shapes very slowly. The head is not saved.
    """

    name, watched, size, rate = "caption", "phrase_f1", 32, 1e-3

    def __init__(self, cache: SceneCache) -> None:
        from transformers import BlipConfig, BlipForConditionalGeneration

        self.length = 40
        self.tokenizer = _tokenizer(cache.summaries, self.length)
        vision = {"hidden_size": 160, "intermediate_size": 480, "num_hidden_layers": 4, "num_attention_heads": 4,
                  "image_size": SIZE, "patch_size": 16}  # fmt: skip
        text = {"vocab_size": len(self.tokenizer), "hidden_size": 128, "encoder_hidden_size": 160,
                "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
                "max_position_embeddings": self.length + 8, "bos_token_id": _CLS, "eos_token_id": _SEP,
                "sep_token_id": _SEP, "pad_token_id": 0, "label_smoothing": 0.0, "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0}  # fmt: skip
        config = BlipConfig(text_config=text, vision_config=vision, projection_dim=128, label_smoothing=0.0)
        self.model = BlipForConditionalGeneration(config)
        self.model.classes = nn.Linear(160, 4 * 4 * len(CLASSES))
        self._words = dict[int, tuple[torch.Tensor, torch.Tensor]]()

    def _ids(self, cache: SceneCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of the summaries and of their mirror images, made once a cache."""
        if id(cache) not in self._words:
            sides = (cache.summaries, [mirror_summary(text) for text in cache.summaries])
            plain, mirrored_ = (_token_ids(self.tokenizer, texts, self.length) for texts in sides)
            self._words[id(cache)] = (plain, mirrored_)
        return self._words[id(cache)]

    def loss(self, cache: SceneCache, rows: Rows, flip: Flip) -> torch.Tensor:
        plain, other = self._ids(cache)
        ids = torch.where(torch.from_numpy(flip)[:, None], other[rows], plain[rows])
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]
        outputs = self.model(
            pixel_values=pixels(cache, rows, flip), input_ids=ids, attention_mask=(ids != 0).long(),
            labels=ids.masked_fill(ids == 0, -100),
        )  # fmt: skip
        # The model's output holds the vision tower's last tokens, the class token first.
        tokens = outputs.last_hidden_state[:, 1:].unflatten(1, (SIZE // 16, SIZE // 16))
        loss: torch.Tensor = outputs.loss
        return loss + patch_class_loss(self.model.classes, tokens, mirrored(cache.semantic[rows], flip))

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found: list[str] = []
        for batch in all_rows(cache):
            ids = self.model.generate(pixel_values=pixels(cache, *batch), max_new_tokens=self.length, do_sample=False)
            found += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        figures = caption_figures(found, cache.summaries)
        return figures["phrase_f1"], figures

    def save(self, folder: Path) -> None:
        from transformers import BlipImageProcessor, BlipProcessor

        save_half(self.model, folder, drop=("classes",))
        images = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=HALF, image_std=HALF)
        BlipProcessor(images, self.tokenizer).save_pretrained(folder)

    def load(self, folder: Path) -> None:
        load_half(self.model, folder, extra="classes.")
