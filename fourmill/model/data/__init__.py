"""Datasets of tokens for training: opened, checked, split, mixed, and read a batch at a time.

dataset    samples of one dataset by number             mixture   several as one, by weight
order      the sequence of an epoch                     splits    which samples are held out
source     shards by place: folder, object storage      tars      … or an export of WebDataset tars
cache      object storage's shards as local files       options   what is read
opened     where values lie; memory reads them          pictures  raw pixels
"""

from fourmill.model.config import DatasetShare, ShardCacheConfig
from fourmill.model.data.dataset import TokenDataset
from fourmill.model.data.mixture import Mixture, open_data
from fourmill.model.data.options import DataConfig, data_config
from fourmill.pipeline.splits import is_held_out

__all__ = [
    "DataConfig",
    "DatasetShare",
    "Mixture",
    "ShardCacheConfig",
    "TokenDataset",
    "data_config",
    "is_held_out",
    "open_data",
]
