"""What is configured about the model, its masking and its training; no torch here, so that a plan is checked fast."""

from fourmill.model.config.architecture import Architecture, ModalityInfo, ModelConfig
from fourmill.model.config.base import EOS, FIRST_SENTINEL, PAD, PIXELS, SEQUENCE_POSITIONS, SOS, UNK
from fourmill.model.config.data import DatasetShare, ShardCacheConfig
from fourmill.model.config.masking import MaskingConfig, Mixture
from fourmill.model.config.pretrain import FREE, PretrainConfig

__all__ = [
    "EOS",
    "FIRST_SENTINEL",
    "FREE",
    "PAD",
    "PIXELS",
    "SEQUENCE_POSITIONS",
    "SOS",
    "UNK",
    "Architecture",
    "DatasetShare",
    "MaskingConfig",
    "Mixture",
    "ModalityInfo",
    "ModelConfig",
    "PretrainConfig",
    "ShardCacheConfig",
]
