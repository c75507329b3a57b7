"""Denoisers have the weights of ml-4m's published decoders, and configurations that cannot work are refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from tiny_diffusion import UNET, UVIT, XATTN, awake, noise

from fourmill.tokenizers.networks.diffusion import build_denoiser
from fourmill.tokenizers.networks.diffusion_config import (
    DENOISERS,
    DiffusionConfig,
    UNetConfig,
    UViTConfig,
    from_published,
)

PUBLISHED = Path(__file__).parents[2] / "shared" / "reference-data" / "ml4m" / "published_shapes"
DEPTH_CONFIG = {
    "dec_type": "unet_patched",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "prediction_type": "sample",
    "clip_sample": False,
    "thresholding": False,
    "conditioning": "add",
    "zero_terminal_snr": True,
    "scheduler": "ddim",
    "n_channels": 1,
}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no shapes of published checkpoints beside the repository")
@pytest.mark.parametrize("name", ["depth_8k_224-448", "normal_8k_224-448", "rgb_16k_224-448", "edge_8k_224-512"])
def test_published_decoders_have_exactly_our_weights(name: str) -> None:
    published = json.loads((PUBLISHED / f"4M_tokenizers_{name}.json").read_text())
    config, prefix = published["config"], "decoder."
    wanted = {k.removeprefix(prefix): v for k, (_, v) in published["tensors"].items() if k.startswith(prefix)}
    with torch.device("meta"):
        network = build_denoiser(from_published(config), config["n_channels"], 32, config["image_size"])
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == wanted


@pytest.mark.parametrize(
    ("name", "channels", "tensors", "values", "some"),
    [
        (
            "unet_patched",
            1,
            446,
            196_202_768,
            {
                "time_embed.2.weight": [1024, 1024],
                "input_blocks.0.0.weight": [256, 48, 3, 3],
                "input_blocks.4.0.op.weight": [256, 256, 3, 3],
                "input_blocks.15.1.qkv.weight": [1536, 512, 1],
                "output_blocks.3.2.conv.weight": [512, 512, 3, 3],
                "output_blocks.15.0.skip_connection.weight": [256, 512, 1, 1],
                "out.2.weight": [16, 256, 3, 3],
            },
        ),
        ("unet_patched", 3, 446, 196_350_256, {"input_blocks.0.0.weight": [256, 80, 3, 3], "out.2.bias": [48]}),
        (
            "uvit_b_p4_f16",
            1,
            334,
            128_119_297,
            {
                "conv_in.weight": [128, 1, 4, 4],
                "down_blocks.1.resnets.0.conv_shortcut.weight": [256, 128, 1, 1],
                "up_blocks.1.resnets.0.conv1.weight": [128, 384, 3, 3],
                "downsample_mid.Conv2d_0.weight": [256, 256, 3, 3],
                "downsample_mid.conv.weight": [256, 256, 3, 3],
                "mid_block.mid_pos_emb": [1, 768, 32, 32],
                "mid_block.mid_block.11.adaLN_modulation.weight": [3072, 512],
                "mid_block.mask_token": [768],
                "conv_out.weight": [128, 1, 4, 4],
            },
        ),
    ],
)
def test_published_sizes_by_name(
    name: str, channels: int, tensors: int, values: int, some: dict[str, list[int]]
) -> None:
    with torch.device("meta"):
        network = build_denoiser(DiffusionConfig(denoiser=DENOISERS[name]), channels, 32, 224)
    state = {k: list(v.shape) for k, v in network.state_dict().items()}
    assert len(state) == tensors
    assert sum(torch.Size(shape).numel() for shape in state.values()) == values
    assert {k: state[k] for k in some} == some


def test_published_configuration_of_depth_is_understood() -> None:
    assert from_published(DEPTH_CONFIG) == DiffusionConfig(denoiser=UNetConfig())


def test_absent_keys_of_a_published_configuration_have_the_defaults_of_ml_4m() -> None:
    config = from_published({"dec_type": "uvit_b_p4_f16"})
    assert (config.beta_schedule, config.prediction) == ("squaredcos_cap_v2", "v_prediction")
    assert (config.thresholding, config.clip_sample, config.zero_terminal_snr) == (True, False, True)
    assert config.denoiser == UViTConfig(conditioning="concat", dropout=0.2)


def test_published_decoder_without_diffusion_is_refused() -> None:
    with pytest.raises(ValueError, match="dec_type 'vit_b_dec' is not a diffusion decoder; known: unet_patched"):
        from_published({"dec_type": "vit_b_dec"})


def test_the_stored_twin_of_a_convolution_is_one_weight() -> None:
    network = awake(UVIT)
    state = load(save(network.state_dict()))  # safetensors refuses tensors that share memory
    assert torch.equal(state["downsample_mid.Conv2d_0.weight"], state["downsample_mid.conv.weight"])
    assert not any("Conv2d_0" in name for name, _ in network.named_parameters())


@pytest.mark.parametrize("absent", ["conv", "Conv2d_0"])
def test_either_name_of_the_twin_is_enough_to_load_it(absent: str) -> None:
    source, target = awake(UVIT), build_denoiser(DiffusionConfig(denoiser=UVIT), 1, 4, 16)
    state = {k: v for k, v in source.state_dict().items() if f"downsample_mid.{absent}." not in k}
    target.load_state_dict(state)
    assert torch.equal(target.downsample_mid.conv.weight, source.downsample_mid.conv.weight)


def test_a_state_without_either_name_of_the_twin_is_refused() -> None:
    network = awake(UVIT)
    state = {k: v for k, v in network.state_dict().items() if "downsample_mid" not in k}
    with pytest.raises(RuntimeError, match=r"downsample_mid\.conv\.weight"):
        network.load_state_dict(state)


@pytest.mark.parametrize(("sizes", "multiple"), [(UNET, 4), (UVIT, 4), (UNetConfig(), 32), (UViTConfig(), 16)])
def test_a_side_that_cannot_be_halved_is_refused(sizes: UNetConfig | UViTConfig, multiple: int) -> None:
    message = f"size {multiple * 3 // 2} is not a multiple of {multiple}, the denoiser's patch and its halvings"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_denoiser(DiffusionConfig(denoiser=sizes), 1, 4, multiple * 3 // 2)


@pytest.mark.parametrize("sizes", [UNET, UVIT, XATTN])
def test_branches_of_a_new_denoiser_start_closed(sizes: UNetConfig | UViTConfig) -> None:
    """Its branches start closed: a UNet at 0, a UViT without its transformer's blocks."""
    network = build_denoiser(DiffusionConfig(denoiser=sizes), 1, 4, 16).eval()
    with torch.no_grad():
        output = network(noise(1, 1, 16, 16), torch.tensor([5]), noise(1, 4, 2, 2))
    if sizes is UNET:
        assert output.abs().max() == 0.0
    elif isinstance(sizes, UViTConfig):
        assert all(block.adaLN_gate.weight.abs().max() == 0 for block in network.mid_block.mid_block)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoiser": "unet"}, "unknown denoiser 'unet'; known: unet_patched"),
        ({"denoiser": {"kind": "unet", "dim": 48}}, r"widths \[48, 96, 96, 96\] must be multiples of the 32 groups"),
        ({"denoiser": {"kind": "unet", "attention_at": [3]}}, r"attention_at \[3\]: the levels are \[1, 2, 4, 8\]"),
        ({"denoiser": {"kind": "unet", "multipliers": []}}, "one or more"),
        ({"denoiser": {"kind": "unet", "heads": 3}}, "not multiples of heads 3"),
        ({"denoiser": {"kind": "uvit", "dim": 100}}, "dim 100 is not a multiple of 4 and of heads 12"),
        ({"denoiser": {"kind": "uvit", "long_skip": True}}, "layers 12 must be odd with long_skip"),
        ({"beta_schedule": "cosine"}, "unknown beta_schedule 'cosine'; known: linear, scaled_linear"),
        ({"beta_schedule": "shifted_cosine:much"}, "the shift must be a positive number"),
        ({"beta_schedule": "shifted_cosine:-1"}, "the shift must be a positive number"),
        ({"prediction": "epsilon"}, "prediction 'epsilon' says nothing about the picture where all is noise"),
        ({"timesteps": 10}, "steps 25 is more than the 10 timesteps there are"),
        ({"schedule": "linear"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DiffusionConfig(**settings)


def test_a_configuration_survives_json() -> None:
    config = DiffusionConfig(denoiser="uvit_b_p4_f8", beta_schedule="shifted_cosine:0.5")  # type: ignore[arg-type]
    assert config.denoiser == UViTConfig(downsample_middle=False)
    assert config.shift == 0.5
    assert DiffusionConfig.model_validate_json(config.model_dump_json()) == config


def test_configuration_is_read_without_torch() -> None:
    code = "import sys, fourmill.tokenizers.networks.diffusion_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
