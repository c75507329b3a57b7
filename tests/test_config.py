"""Configuration: overrides, and refusals that say where and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourmill.config import Config, ConfigError, load_config, save_config
from fourmill.tokenizers.training.config import TrainTokenizerConfig

ROOT = Path(__file__).parent.parent


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_dotted_overrides_reach_into_sections_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "dataset: a\ncrops: {size: 64}\n")
    config = load_config(path, ["dataset=s3://b/x", "crops.count=3", "stages.one={labelers: [x]}", "stages.one.cpus=2"])
    assert config.dataset == "s3://b/x"
    assert (config.crops.size, config.crops.count) == (64, 3)
    assert config.stages["one"].cpus == 2
    assert config.stages["one"].labelers == ("x",)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("datset: a\n", [], "datset: unknown key 'datset'; did you mean 'dataset'"),
        ("dataset: a\ncrops: {sise: 3}\n", [], "crops.sise: unknown key 'sise'; did you mean 'size'"),
        (
            "dataset: a\nstages: {t: {labeler: [x]}}\n",
            [],
            "stages.t.labeler: unknown key 'labeler'; did you mean 'labelers'",
        ),
        ("crops: {}\n", [], "dataset: is required"),
        ("dataset: a\n", ["crops.size=two"], "crops.size: .*it is 'two'"),
        ("dataset: a\n", ["crops"], "give a.b=value"),
        ("dataset: a\n", ["dataset.x=1"], "dataset is 'a', not a section"),
        ("dataset: [\n", [], "is not YAML"),
        ("- a\n", [], "must hold a mapping"),
    ],
)
def test_bad_configuration_is_refused_with_place_and_remedy(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_every_problem_gets_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "datset: a\ncrops: {size: -1}\n"))
    assert len(str(caught.value).splitlines()) == 3  # unknown key, missing dataset, size below 16


def test_saved_configuration_loads_to_the_same(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "demo.yaml")
    path = tmp_path / "saved.yaml"
    path.write_bytes(save_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configuration_is_valid_and_says_what_it_needs(path: Path) -> None:
    text = path.read_text()
    head = text.split("\n\n")[0] + text
    for word in ("command", "hardware", "time", "result"):
        assert f"#   {word}" in head
    load_config(path, [], TrainTokenizerConfig if path.stem == "train_tokenizer" else Config)
