"""Loading SAM: which family a checkpoint is of, and the original's networks, whose files carry no configuration.

Everything but the number of heads of the mask decoder (eight in all published files) follows from the tensors' shapes,
so ViT-B, L and H, and small networks of the same build, load from their weights alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from fourmill.checkpoints import Checkpoint
from fourmill.labelers.loading import load_class, load_model, load_processor
from fourmill.labelers.sam_networks import SamNetwork, SegmentAnything, TransformersSam, TransformersSam2
from fourmill.labelers.weights import is_bare, read_weights

_DECODER_HEADS = 8
# Published files of SAM 2 and EdgeTAM are of the video networks, whose picture part these classes load.
_CLASSES = {
    "sam": ("SamModel", TransformersSam),
    "sam2": ("Sam2Model", TransformersSam2),
    "sam2_video": ("Sam2Model", TransformersSam2),
    "edgetam": ("EdgeTamModel", TransformersSam2),
    "edgetam_video": ("EdgeTamModel", TransformersSam2),
}


def load_network(checkpoint: Checkpoint) -> SamNetwork:
    """The network at a checkpoint, on the CPU in float32. ValueError for any other family than the three."""
    if is_bare(checkpoint):
        return SegmentAnything(segment_anything(read_weights(checkpoint), checkpoint.reference))
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint.location, revision=checkpoint.revision)
    if config.model_type not in _CLASSES:
        load_model([], checkpoint, "sam")  # always a ValueError: it says which labeler takes the checkpoint
    name, network = _CLASSES[config.model_type]
    return network(load_class(getattr(transformers, name), checkpoint), load_processor(checkpoint))


def segment_anything(state: Mapping[str, torch.Tensor], reference: str) -> Any:
    """The original library's `Sam` that the tensors fit, all of them."""
    try:
        model = _build(state)
    except KeyError as error:
        raise ValueError(f"{reference} is no checkpoint of segment_anything: it has no {error.args[0]}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{reference} does not fit segment_anything's network: {error}") from error
    return model


def _build(state: Mapping[str, torch.Tensor]) -> Any:
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    sizes = encoder_sizes(state)
    channels = state["image_encoder.neck.0.weight"].shape[0]
    grid = sizes["img_size"] // sizes["patch_size"]
    decoder, layers = "mask_decoder.", "mask_decoder.transformer.layers."
    inner = state[f"{layers}0.cross_attn_token_to_image.q_proj.weight"].shape[0]
    return Sam(
        ImageEncoderViT(
            **sizes,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
            qkv_bias=True,
            use_rel_pos=True,
            out_chans=channels,
        ),
        PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(grid, grid),
            input_image_size=(sizes["img_size"], sizes["img_size"]),
            mask_in_chans=state["prompt_encoder.mask_downscaling.3.weight"].shape[0],
        ),
        MaskDecoder(
            num_multimask_outputs=state[f"{decoder}mask_tokens.weight"].shape[0] - 1,
            transformer=TwoWayTransformer(
                depth=_count(state, layers),
                embedding_dim=channels,
                mlp_dim=state[f"{layers}0.mlp.lin1.weight"].shape[0],
                num_heads=_DECODER_HEADS,
                attention_downsample_rate=channels // inner,
            ),
            transformer_dim=channels,
            iou_head_depth=_count(state, f"{decoder}iou_prediction_head.layers."),
            iou_head_hidden_dim=state[f"{decoder}iou_prediction_head.layers.0.weight"].shape[0],
        ),
        # The original's normalisation, of pixels in 0..255; its files do not hold it.
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )


def encoder_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The image encoder's arguments from the shapes of its tensors.

    A relative position table has 2 n - 1 rows for attention over n x n patches, and a column for each channel of a
    head: it tells windowed blocks from global ones, and the number of heads.
    """
    embed_dim, _, patch, _ = state["image_encoder.patch_embed.proj.weight"].shape
    grid = state["image_encoder.pos_embed"].shape[1]
    depth = _count(state, "image_encoder.blocks.")
    tables = [state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape for i in range(depth)]
    reach = [(rows + 1) // 2 for rows, _ in tables]
    return {
        "img_size": grid * patch,
        "patch_size": patch,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": embed_dim // tables[0][1],
        "mlp_ratio": state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0] / embed_dim,
        "window_size": min(reach),
        "global_attn_indexes": tuple(i for i in range(depth) if reach[i] == grid),
    }


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbered parts there are below a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
