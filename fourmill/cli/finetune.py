"""`fourmill finetune`."""

from __future__ import annotations

from fourmill.cli.options import ConfigOption, Overrides


def finetune(config: ConfigOption, overrides: Overrides = None) -> int:
    """Fine-tune a pretrained 4M's encoder on RGB: classification, segmentation, depth or normals.

    fourmill finetune --config finetune.yaml

    fourmill finetune --config finetune.yaml task=depth train_samples=256 out=runs/depth-256

    fourmill finetune -c finetune.yaml task=classification dataset= images=/data/imagenet freeze_encoder=true
    """
    from fourmill.config import load_config
    from fourmill.model.finetune.config import FinetuneConfig
    from fourmill.model.finetune.train import finetune as train

    print(train(load_config(config, overrides or [], FinetuneConfig), progress=print))
    return 0
