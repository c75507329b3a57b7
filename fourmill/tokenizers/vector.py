"""Vector tokenizer: one global feature vector becomes a few tokens, one for each codebook, and back (4M-21)."""

from __future__ import annotations

from fourmill.tokenizers.spatial import SpatialTokenizer


class VectorTokenizer(SpatialTokenizer):
    """Tokens of clip_global, dinov2_global and imagebind_global by MLPs and product quantization.

    A row of ids is a grid of one row, (1, number of codebooks).
    """

    version = 1
    architecture = "mlp"
