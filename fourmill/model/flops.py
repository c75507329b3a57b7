"""How many floating-point operations a training step needs, for model FLOPs utilisation (MFU).

Counted are the matrix products of the forward pass and twice as many for the gradient, as in Chowdhery et al. 2022
(arXiv 2204.02311, appendix B): a multiplication and an addition each, nothing for norms, softmax or embeddings looked
up, nothing for what activation checkpointing computes again.
"""

from __future__ import annotations

from statistics import fmean

from fourmill.model.config import Architecture


def flops_per_sample(architecture: Architecture, num_input: int, num_target: int) -> float:
    """Of one sample with `num_input` visible and `num_target` predicted tokens, shared evenly by the modalities.

    The share matters for the logits alone (and, a little, for patches of pixels): vocabularies differ.
    """
    a = architecture
    infos_in, infos_out = ([a.modalities[n] for n in names] for names in (a.domains_in, a.domains_out))
    patch = 3 * a.patch_size**2
    embedded = fmean({"pixels": patch, "vectors": info.width}.get(info.kind, 0) for info in infos_in)
    vocabulary = fmean(info.vocabulary for info in infos_out)
    context = num_input + a.num_register_tokens

    hidden = int(a.mlp_ratio * a.dim)
    mlp = 3 * a.dim * int(2 * hidden / 3) if a.gated_mlp else 2 * a.dim * hidden
    square = a.dim**2
    encoder = context * (4 * square + mlp) + 2 * context * context * a.dim  # q, k, v and output; scores and mixing
    decoder = num_target * (6 * square + mlp) + context * 2 * square + 2 * num_target * (num_target + context) * a.dim
    ends = num_input * embedded * a.dim + context * square + num_target * vocabulary * a.dim
    forward = 2 * (a.encoder_depth * encoder + a.decoder_depth * decoder + ends)
    return 3 * forward
