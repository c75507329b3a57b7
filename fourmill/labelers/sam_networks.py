"""Three families of Segment Anything behind one interface: a point grid on a batch of pictures -> candidate masks.

    segment_anything    the original's ViT-B, L and H, from its bare `.pth` files (or any size, as safetensors)
    SamModel            transformers' SAM
    Sam2Model           transformers' SAM 2 and 2.1 (Hiera), and EdgeTamModel, which has the same decoder

Each class only says where its library keeps the parts; `SamNetwork.decode` puts them together, and saves what the
libraries' own forward passes waste on a grid of points. The predicted IoU comes from a token, before any mask exists,
so points whose masks all fall below the threshold are never upscaled (a quarter of the decoder's operations).

Invariant: for the points that are kept, scores and logits are those of the library's own forward pass.

Shapes: B pictures, P points of a decoder call, N = B x P prompts, n of them kept, m masks kept, T tokens, C channels,
h x w the encoder's grid, H x W = 4h x 4w.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fourmill.labelers.loading import process


@dataclass(frozen=True)
class Embedded:
    """Pictures that went through the encoder: (B, C, h, w) with the prompt of no mask added, and SAM 2's finer maps."""

    image: torch.Tensor
    finer: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Candidates:
    """m masks: which picture (m,), which point of the call (m,), predicted IoU (m,), logits (m, H, W), float32."""

    picture: torch.Tensor
    point: torch.Tensor
    score: torch.Tensor
    logits: torch.Tensor

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, rows: torch.Tensor) -> Candidates:
        return Candidates(self.picture[rows], self.point[rows], self.score[rows], self.logits[rows])

    @staticmethod
    def cat(parts: Sequence[Candidates]) -> Candidates:
        names = ("picture", "point", "score", "logits")
        return Candidates(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


class SamNetwork(ABC):
    """A loaded network. `size`: side of the square that its encoder sees."""

    size: int
    encoder: Any
    decoder: Any
    first_mask: int
    """Where the tokens of masks begin; the token of the predicted IoU stands before them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def sizes(self, size: int) -> tuple[int, ...]:
        """Through which sides masks are resized to the picture's: SAM goes by way of its input's, SAM 2 directly."""
        return (self.size, size)

    @abstractmethod
    def embed(self, pixels_BCSS: torch.Tensor) -> Embedded:
        """uint8 (B, 3, S, S) of any S, resized and normalised as the family does, through the encoder."""

    @abstractmethod
    def prompts(self, points_P2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points as x, y in 0..1 -> (P, t, C), and the prompt that stands for no mask, (1, C, h, w)."""

    @abstractmethod
    def positions(self) -> torch.Tensor:
        """The encoder grid's position embedding, (1, C, h, w)."""

    @abstractmethod
    def mix(
        self, image_NChw: torch.Tensor, positions_NChw: torch.Tensor, tokens_NTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two-way transformer: tokens (N, T, C) and pictures (N, h x w, C) after attending to each other."""

    @abstractmethod
    def upscale(self, image_nChw: torch.Tensor, finer: Sequence[torch.Tensor]) -> torch.Tensor:
        """The picture of each kept prompt at four times the grid, (n, C / 8, H, W)."""

    def tokens(self, points_P2: torch.Tensor) -> torch.Tensor:
        """All tokens of each prompt, (P, T, C). The same for every picture, so made once."""
        sparse, _ = self.prompts(points_P2)
        own = torch.cat([weights.weight for weights in self._own_tokens()])
        return torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)

    def _own_tokens(self) -> list[Any]:
        return [self.decoder.iou_token, self.decoder.mask_tokens]

    def decode(self, embedded: Embedded, tokens_PTC: torch.Tensor, iou_thresh: float) -> Candidates:
        """Every picture with every point of the call: the masks whose predicted IoU is above the threshold.

        The first mask token (for unambiguous prompts) is left out, as the libraries do for a single point.
        """
        pictures, points = len(embedded.image), len(tokens_PTC)
        image = embedded.image.repeat_interleave(points, dim=0)
        height, width = image.shape[-2:]
        positions = self.positions().expand(len(image), -1, -1, -1)
        tokens_NTC, mixed = self.mix(image, positions, tokens_PTC.repeat(pictures, 1, 1))
        iou_N3 = self.decoder.iou_prediction_head(tokens_NTC[:, self.first_mask - 1])[:, 1:].float()
        prompt, mask = torch.nonzero(iou_N3 > iou_thresh, as_tuple=True)
        kept, inverse = torch.unique(prompt, return_inverse=True)
        if not len(kept):
            return Candidates(prompt, prompt, iou_N3[prompt, mask], iou_N3.new_zeros(0, 4 * height, 4 * width))
        mixed = mixed[kept].transpose(1, 2).unflatten(2, (height, width))
        up = self.upscale(mixed, [finer[kept // points] for finer in embedded.finer])
        kernels = [
            mlp(tokens_NTC[kept, self.first_mask + i])
            for i, mlp in enumerate(self.decoder.output_hypernetworks_mlps)
            if i > 0
        ]
        logits = (torch.stack(kernels, dim=1) @ up.flatten(2)).unflatten(2, up.shape[-2:])
        return Candidates(prompt // points, prompt % points, iou_N3[prompt, mask], logits[inverse, mask].float())


class SegmentAnything(SamNetwork):
    """The original library's network, `segment_anything.modeling.Sam`."""

    first_mask = 1

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.size, self.encoder, self.decoder = model.image_encoder.img_size, model.image_encoder, model.mask_decoder

    def embed(self, pixels_BCSS: torch.Tensor) -> Embedded:
        from torchvision.transforms.v2.functional import resize

        resized = resize(
            pixels_BCSS, [self.size, self.size], antialias=True
        )  # bilinear, as Pillow does for the original
        image = self.encoder((resized - self.model.pixel_mean) / self.model.pixel_std)
        return Embedded(image + self.prompts(torch.zeros(1, 2, device=image.device))[1])

    def prompts(self, points_P2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        points = ((points_P2 * self.size)[:, None], torch.ones(len(points_P2), 1, device=points_P2.device))
        sparse, dense = self.model.prompt_encoder(points=points, boxes=None, masks=None)
        return sparse, dense[:1]

    def positions(self) -> torch.Tensor:
        return self.model.prompt_encoder.get_dense_pe()

    def mix(
        self, image_NChw: torch.Tensor, positions_NChw: torch.Tensor, tokens_NTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.decoder.transformer(image_NChw, positions_NChw, tokens_NTC)

    def upscale(self, image_nChw: torch.Tensor, finer: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.decoder.output_upscaling(image_nChw)


class TransformersSam(SamNetwork):
    """transformers' `SamModel` and its image processor."""

    first_mask = 1

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model)
        self.processor = processor
        self.size = int(model.prompt_encoder.input_image_size)
        self.encoder, self.decoder = model.vision_encoder, model.mask_decoder
        self._check_processor()

    def _check_processor(self) -> None:
        """ValueError unless a square picture fills the network's whole input: points and masks are relative to it."""
        made = process(self.processor, torch.zeros(1, 3, self.size // 2, self.size // 2, dtype=torch.uint8))
        shapes = {tuple(made["pixel_values"].shape[-2:])}
        if "reshaped_input_sizes" in made:
            shapes.add(tuple(int(side) for side in made["reshaped_input_sizes"][0]))
        if shapes != {(self.size, self.size)}:
            raise ValueError(
                f"the processor makes {' and '.join(map(str, sorted(shapes)))} of a square picture (with and without "
                f"padding), the network takes {self.size} x {self.size}: set size and pad_size in its configuration"
            )

    def embed(self, pixels_BCSS: torch.Tensor) -> Embedded:
        image = self.encoder(process(self.processor, pixels_BCSS)["pixel_values"])[0]
        return Embedded(image + self.prompts(torch.zeros(1, 2, device=image.device))[1])

    def prompts(self, points_P2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        points = (points_P2 * self.size)[None, :, None]
        labels = torch.ones(points.shape[:-1], dtype=torch.int, device=points.device)
        sparse, dense = self.model.prompt_encoder(points, labels, None, None)
        return sparse[0], dense[:1]

    def positions(self) -> torch.Tensor:
        return self.model.get_image_wide_positional_embeddings()

    def mix(
        self, image_NChw: torch.Tensor, positions_NChw: torch.Tensor, tokens_NTC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, image = self.decoder.transformer(
            point_embeddings=tokens_NTC[:, None],  # one point a prompt
            image_embeddings=image_NChw,
            image_positional_embeddings=positions_NChw,
            attention_similarity=None,
            target_embedding=None,
        )
        return tokens[:, 0], image[:, 0]

    def upscale(self, image_nChw: torch.Tensor, finer: Sequence[torch.Tensor]) -> torch.Tensor:
        decoder = self.decoder
        middle = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(image_nChw)))
        return decoder.activation(decoder.upscale_conv2(middle))


class TransformersSam2(TransformersSam):
    """transformers' `Sam2Model` or `EdgeTamModel`: the decoder adds finer maps of the encoder while it upscales."""

    first_mask = 2  # after the tokens of the object's presence and of the predicted IoU

    def sizes(self, size: int) -> tuple[int, ...]:
        return (size,)

    def embed(self, pixels_BCSS: torch.Tensor) -> Embedded:
        *finer, image = self.model.get_image_embeddings(process(self.processor, pixels_BCSS)["pixel_values"])
        return Embedded(image + self.prompts(torch.zeros(1, 2, device=image.device))[1], tuple(finer))

    def _own_tokens(self) -> list[Any]:
        return [self.decoder.obj_score_token, *super()._own_tokens()]

    def upscale(self, image_nChw: torch.Tensor, finer: Sequence[torch.Tensor]) -> torch.Tensor:
        decoder, (fine, middle) = self.decoder, finer
        image = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(image_nChw) + middle))
        return decoder.activation(decoder.upscale_conv2(image) + fine)
