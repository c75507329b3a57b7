"""The four demo teachers: what each network looks like, its loss, its validation score and how it is saved.

Shape legend: B batch, S side of the picture (128), L tokens, C channels, K classes.
Invariants: a saved folder loads with the library's own `from_pretrained` and nothing of this project; weights are
stored in float16; pictures enter a network as (x / 255 - 0.5) / 0.5, which is also what the saved processor does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fourmill.demo.teacher_figures import (
    Figures,
    caption_figures,
    depth_figures,
    retrieval_figures,
    semseg_figures,
)
from fourmill.scenes import CLASSES
from fourmill.scenes.cache import SceneCache

SIZE = 128
_HALF = [0.5, 0.5, 0.5]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CLS, _SEP = 2, 3
_EMBED = 128  # channels of the CLIP space
_TEXT = 48  # the longest of 32,000 captions has 43 tokens


class Task(Protocol):
    """One teacher in training. `rate` is the peak learning rate, `size` the batch size."""

    name: str
    size: int
    rate: float
    model: nn.Module

    def loss(self, cache: SceneCache, rows: NDArray[np.intp], flip: NDArray[np.bool_]) -> torch.Tensor:
        """Mean loss over these rows, those in `flip` mirrored."""
        ...

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        """What to maximise on validation scenes, and the figures it was taken from."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that the library loads by itself."""
        ...


def pixels(cache: SceneCache, rows: NDArray[np.intp], flip: NDArray[np.bool_]) -> torch.Tensor:
    """(B, 3, S, S) float32 in -1..1, channels last."""
    images = torch.from_numpy(_mirrored(cache.images[rows], flip)).permute(0, 3, 1, 2)
    return images.float().div_(127.5).sub_(1)


def _mirrored(arrays: NDArray[Any], flip: NDArray[np.bool_]) -> NDArray[Any]:
    arrays[flip] = arrays[flip][:, :, ::-1]
    return arrays


def _all_rows(cache: SceneCache) -> list[tuple[NDArray[np.intp], NDArray[np.bool_]]]:
    return [(rows, np.zeros(len(rows), bool)) for rows in np.array_split(np.arange(len(cache)), -(-len(cache) // 64))]


class DepthTask:
    """DPT over 8 x 8 patches; metres, from an L1 loss on log depth and on its gradients."""

    name, size, rate = "depth", 8, 8e-4

    def __init__(self, cache: SceneCache) -> None:
        from transformers import DPTConfig, DPTForDepthEstimation

        # Patches of 8 px did no better for the same CPU time; widths in multiples of 32 suit bfloat16 kernels.
        config = DPTConfig(
            image_size=SIZE, patch_size=16, hidden_size=160, num_hidden_layers=5, num_attention_heads=4,
            intermediate_size=480, backbone_out_indices=[1, 2, 3, 4], neck_hidden_sizes=[32, 64, 64, 96],
            reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=64, readout_type="ignore",
            use_auxiliary_head=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.model = DPTForDepthEstimation(config).to(memory_format=torch.channels_last)
        # The last ReLU starts at the mean depth of the scenes: at zero it could die.
        nn.init.constant_(self.model.head.head[-2].bias, 4.0)

    def loss(self, cache: SceneCache, rows: NDArray[np.intp], flip: NDArray[np.bool_]) -> torch.Tensor:
        truth = torch.from_numpy(_mirrored(cache.depth[rows].astype(np.float32), flip)).log()
        guess = self.model(pixels(cache, rows, flip)).predicted_depth.float().clamp(min=0.05).log()
        off = guess - truth
        edges = off.diff(dim=1).abs().mean() + off.diff(dim=2).abs().mean()
        return off.abs().mean() + edges

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found = [self.model(pixels(cache, *batch)).predicted_depth.float().numpy() for batch in _all_rows(cache)]
        figures = depth_figures(np.concatenate(found), cache.depth.astype(np.float32))
        return -figures["absrel"], figures

    def save(self, folder: Path) -> None:
        from transformers import DPTImageProcessor

        self.model.half().save_pretrained(folder)
        DPTImageProcessor(
            size={"height": SIZE, "width": SIZE}, keep_aspect_ratio=False, image_mean=_HALF, image_std=_HALF
        ).save_pretrained(folder)


class SemsegTask:
    """Segformer; cross-entropy at full resolution, the two background classes at half weight."""

    name, size, rate = "semseg", 16, 1.5e-3

    def __init__(self, cache: SceneCache) -> None:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        names = dict(enumerate(CLASSES))
        config = SegformerConfig(
            depths=[2, 2, 2, 1], hidden_sizes=[32, 64, 128, 160], num_attention_heads=[1, 2, 4, 5],
            mlp_ratios=[3, 3, 3, 3], decoder_hidden_size=96, drop_path_rate=0.0, classifier_dropout_prob=0.0,
            id2label=names, label2id={name: number for number, name in names.items()},
        )  # fmt: skip
        self.model = SegformerForSemanticSegmentation(config).to(memory_format=torch.channels_last)
        self.weight = torch.tensor([0.5, 0.5, 1, 1, 1, 1])

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(self.model(images).logits.float(), images.shape[-2:], mode="bilinear")

    def loss(self, cache: SceneCache, rows: NDArray[np.intp], flip: NDArray[np.bool_]) -> torch.Tensor:
        truth = torch.from_numpy(_mirrored(cache.semantic[rows], flip)).long()
        return functional.cross_entropy(self._logits(pixels(cache, rows, flip)), truth, self.weight)

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found = [self._logits(pixels(cache, *batch)).argmax(dim=1).numpy() for batch in _all_rows(cache)]
        figures = semseg_figures(np.concatenate(found), cache.semantic)
        return figures["miou"], figures

    def save(self, folder: Path) -> None:
        from transformers import SegformerImageProcessor

        self.model.half().save_pretrained(folder)
        SegformerImageProcessor(
            size={"height": SIZE, "width": SIZE}, image_mean=_HALF, image_std=_HALF, do_reduce_labels=False
        ).save_pretrained(folder)


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

    name, size, rate = "clip", 128, 2e-3

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

    def loss(self, cache: SceneCache, rows: NDArray[np.intp], flip: NDArray[np.bool_]) -> torch.Tensor:
        plain, mirrored = self._ids(cache)
        ids = torch.where(torch.from_numpy(flip)[:, None], mirrored[rows], plain[rows])
        images, texts, scale = self.model(pixels(cache, rows, flip), ids)
        logits = scale.clamp(max=100) * images.float() @ texts.float().T
        target = torch.arange(len(rows))
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        images = torch.cat([self.model.encode_image(pixels(cache, *batch)) for batch in _all_rows(cache)])
        figures = retrieval_figures(images.float(), self.model.encode_text(self._ids(cache)[0]).float())
        return figures["image_to_text_r1"] + figures["text_to_image_r1"], figures

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.half().contiguous() for name, weight in self.model.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        preprocess = {"mean": _HALF, "std": _HALF, "interpolation": "bicubic", "resize_mode": "squash"}
        config = {"model_cfg": self.config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.tokenizer.save_pretrained(folder)


class CaptionTask:
    """BLIP over 8 x 8 patches with a two-layer decoder; cross-entropy on the plain `summary` of a scene.

    While training, a linear head on the patch tokens also names the classes at 4 x 4 points of each patch: words alone
    teach the vision tower shapes very slowly. The head is not saved.
    """

    name, size, rate = "caption", 32, 1e-3

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
        self.model.shapes = nn.Linear(160, 4 * 4 * len(CLASSES))
        self._words = dict[int, torch.Tensor]()

    def loss(self, cache: SceneCache, rows: NDArray[np.intp], flip: NDArray[np.bool_]) -> torch.Tensor:
        # Summaries go from left to right, so pictures are not mirrored here.
        if id(cache) not in self._words:
            self._words[id(cache)] = _token_ids(self.tokenizer, cache.summaries, self.length)
        ids = self._words[id(cache)][rows]
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]
        labels = ids.masked_fill(ids == 0, -100)
        images = pixels(cache, rows, np.zeros_like(flip))
        outputs = self.model(pixel_values=images, input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
        # The model's output holds the vision tower's last tokens: (B, 1 + 64, C), the class token first.
        logits = self.model.shapes(outputs.last_hidden_state[:, 1:]).float().view(-1, 8, 8, 4, 4, len(CLASSES))
        points = torch.from_numpy(cache.semantic[rows][:, 2::4, 2::4]).long()  # (B, 32, 32)
        classes = points.view(-1, 8, 4, 8, 4).transpose(2, 3)
        return outputs.loss + functional.cross_entropy(logits.flatten(0, -2), classes.flatten())

    def score(self, cache: SceneCache) -> tuple[float, Figures]:
        found: list[str] = []
        for batch in _all_rows(cache):
            ids = self.model.generate(pixel_values=pixels(cache, *batch), max_new_tokens=self.length, do_sample=False)
            found += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        figures = caption_figures(found, cache.summaries)
        return figures["phrase_f1"], figures

    def save(self, folder: Path) -> None:
        from transformers import BlipImageProcessor, BlipProcessor

        del self.model.shapes
        self.model.half().save_pretrained(folder)
        images = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=_HALF, image_std=_HALF)
        BlipProcessor(images, self.tokenizer).save_pretrained(folder)


TASKS: dict[str, type[DepthTask] | type[SemsegTask] | type[ClipTask] | type[CaptionTask]] = {
    "depth": DepthTask,
    "semseg": SemsegTask,
    "clip": ClipTask,
    "caption": CaptionTask,
}
