"""`fourmill generate`: from files to files, with the tokenizers that a checkpoint says or that the user names."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import tiny_sequences
import tiny_tokenizers
import torch
from PIL import Image
from test_model import seeded, tiny
from tiny_tokenizers import checkpoint_config, write_checkpoint
from token_toys import Literal

from fourmill.cli.generate import _weights
from fourmill.model.config import ModalityInfo
from fourmill.model.generate.command.inputs import read_samples
from fourmill.model.generate.command.run import Options, run_generate
from fourmill.model.generate.names import label_name, resolve_name, source_name, token_name
from fourmill.model.generate.plan import Target
from fourmill.model.generate.tokenizers import describe, load_tokenizers
from fourmill.model.network import FourM
from fourmill.model.weights import load_model, save_model
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.shards import Spec
from fourmill.pipeline.store import open_store
from fourmill.tokenizers import published

NETWORKS = {  # channels, classes, network
    "rgb": (3, 0, {}),
    "depth": (1, 0, {}),
    "normal": (3, 0, {}),
    "semseg": (4, 5, {}),
    "clip": (6, 0, {}),
}
TEXTS = ("caption", "det")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Studio:
    """A tiny trained-looking model beside its tokenizers and the dataset that tells of them. Tokenizers of 2 x 2 tokens
    for values of 8 x 8; pictures of 32 x 32 pixels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for source, (channels, classes, network) in NETWORKS.items():
            write_checkpoint(folder / source, checkpoint_config(source, channels, classes, **network))
        (folder / "text").mkdir()
        tiny_sequences.write_vocabulary(folder / "text")
        self.tokenizers = {f"tok_{s}": tiny_tokenizers.build(f"tok_{s}", folder / s) for s in NETWORKS}
        self.tokenizers |= {f"tok_{s}": tiny_sequences.build(f"tok_{s}", folder / "text") for s in TEXTS}
        self.dataset = str(folder / "dataset")
        self._put_dataset()
        self.model = self._model()
        (folder / "model").mkdir()
        save_model(self.model, open_store(folder / "model"))
        told = describe(read_manifest(open_store(self.dataset)), self.model.architecture.names)
        (folder / "model" / "tokenizers.json").write_text(json.dumps(told))
        self.photo = folder / "photo.jpg"
        self.photo.write_bytes(helpers.make_jpeg(48, 64, seed=3))

    @property
    def checkpoint(self) -> str:
        return str(self.folder / "model")

    def _put_dataset(self) -> None:
        data = Literal(self.dataset, ["a"])
        data.put("depth", [np.ones((8, 8), np.float32)], spec=Spec(convention="metric"), producer={"class": "Teacher"})
        for name, tokenizer in self.tokenizers.items():
            ids = np.zeros(tokenizer.spec(name).length or 3, np.uint16)
            data.put(name, [ids], spec=tokenizer.spec(name), producer=tokenizer.lineage())
        data.done()

    def _model(self) -> FourM:
        infos: dict[str, ModalityInfo] = {"rgb": ModalityInfo(kind="pixels", tokens=4, grid=(2, 2))}
        for name, tokenizer in self.tokenizers.items():
            if label_name(name) in TEXTS:
                infos[name] = ModalityInfo(kind="sequence", vocabulary=tokenizer.vocabulary, tokens=16)
            else:
                infos[name] = ModalityInfo(kind="grid", vocabulary=tokenizer.vocabulary, tokens=4, grid=(2, 2))
        outside = tuple(name for name in infos if name != "rgb")
        return seeded(tiny(domains_in=tuple(infos), domains_out=outside, modalities=infos))


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("studio"))


def run(
    studio: Studio, sources: list[str], targets: list[str], out: Path | str, *tokenizers: str, **more: Any
) -> list[str]:
    """The lines printed."""
    lines: list[str] = []
    assert run_generate(studio.checkpoint, sources, targets, str(out), tokenizers, Options(**more), lines.append) == 0
    return lines


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_photo_becomes_every_kind_of_file(studio: Studio, tmp_path: Path) -> None:
    wanted = ["depth", "normal", "semseg", "det", "caption", "clip", "rgb"]
    lines = run(studio, [f"rgb={studio.photo}"], wanted, tmp_path)
    arrays = {f"{n}.{s}" for n in ("depth", "normal", "semseg", "clip", "rgb") for s in ("png", "npy", "tokens.npy")}
    texts = {"det.png", "det.json", "det.tokens.json", "caption.txt", "caption.tokens.json"}
    assert files(tmp_path) == arrays | texts | {"overview.png", "generate.json"}
    tokens = np.load(tmp_path / "depth.tokens.npy")
    assert tokens.shape == (4,)
    (depth,) = studio.tokenizers["tok_depth"].decode([tokens])
    assert np.array_equal(np.load(tmp_path / "depth.npy"), depth), "metres, as the tokens say"
    assert np.load(tmp_path / "semseg.npy").dtype == np.uint8
    assert Image.open(tmp_path / "normal.png").size == (8, 8)
    assert Image.open(tmp_path / "det.png").size == (64, 64), "boxes are drawn on the photo, at twice its size"
    assert Image.open(tmp_path / "overview.png").size == (8 * 228 + 4, 22 + 228)
    told = json.loads((tmp_path / "generate.json").read_text())
    assert [Target(**entry).name for entry in told["plan"]] == [f"tok_{name}" for name in wanted]
    assert lines[0] == "depth          depth.png depth.npy depth.tokens.npy"
    assert lines[-1].startswith(f"1 sample in {tmp_path};")


def test_tokens_are_those_of_the_model_for_the_centred_square(studio: Studio, tmp_path: Path) -> None:
    from fourmill.model.predict import predict
    from fourmill.pipeline import images
    from fourmill.pipeline.geometry import Crop, apply_crop

    run(studio, [f"rgb={studio.photo}"], ["depth", "caption"], tmp_path, temperature=0.0)
    square = apply_crop(images.decode(studio.photo.read_bytes()), Crop(0, 8, 48, 48, 0), 32)
    want = predict(studio.model, {"rgb": np.array(square.transpose(2, 0, 1))[None]}, ["tok_depth", "tok_caption"])
    assert np.load(tmp_path / "depth.tokens.npy").tolist() == want["tok_depth"][0].tolist()
    assert json.loads((tmp_path / "caption.tokens.json").read_text()) == want["tok_caption"][0].tolist()


def test_targets_see_each_other_if_asked_to_or_if_there_is_no_picture(studio: Studio, tmp_path: Path) -> None:
    chained = {}
    for place, (sources, chain) in enumerate([("rgb", None), ("rgb", True), ("caption", None), ("caption", False)]):
        given = [f"rgb={studio.photo}"] if sources == "rgb" else ["caption=a red cone"]
        out = tmp_path / str(place)
        run(studio, given, ["depth", "normal"], out, chain=chain, tokens_only=True)
        plan = json.loads((out / "generate.json").read_text())["plan"]
        chained[sources, chain] = plan[1]["conditions"] is None
    assert chained == {("rgb", None): False, ("rgb", True): True, ("caption", None): True, ("caption", False): False}


def test_label_files_texts_and_tokens_are_inputs(studio: Studio, tmp_path: Path) -> None:
    depth = np.linspace(1, 3, 64, dtype=np.float32).reshape(8, 8)
    (tokens,) = studio.tokenizers["tok_depth"].encode(depth[None])
    np.save(tmp_path / "d.npy", depth)
    np.save(tmp_path / "wide.npy", np.pad(np.repeat(depth, 2, 0).repeat(2, 1), [(0, 0), (3, 3)]))
    np.save(tmp_path / "ids.npy", tokens)
    Image.fromarray((depth * 1000).round().astype(np.uint16)).save(tmp_path / "d.png")
    tokenizers = load_tokenizers(studio.checkpoint, studio.model.architecture)
    for name in ("d.npy", "ids.npy", "wide.npy", "d.png"):  # the label, its tokens, a larger map around it, millimetres
        (sample,) = read_samples([f"depth={tmp_path / name}"], studio.model.architecture, tokenizers, [])
        assert sample.values["tok_depth"].tolist() == tokens.tolist(), name
        if name != "ids.npy":
            assert np.abs(sample.shown["tok_depth"] - depth).max() <= (0.0005 if name == "d.png" else 0), name
    run(studio, [f"depth={tmp_path / 'd.npy'}", "caption=a red cone"], ["normal"], tmp_path / "maps")
    objects = '[{"class_name": "cone", "score": 1.0, "box": [0.1, 0.1, 0.5, 0.5]}]'
    run(studio, [f"det={objects}"], ["semseg"], tmp_path / "boxes")


def test_several_photos_are_a_batch_that_changes_nothing(studio: Studio, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        (tmp_path / f"p{seed}.jpg").write_bytes(helpers.make_jpeg(40, 40, seed=seed))
    settings = {"steps": 2, "temperature": 2.0, "seed": 5}
    run(studio, [f"rgb={tmp_path}/p*.jpg"], ["depth"], tmp_path / "all", **settings)
    run(studio, [f"rgb={tmp_path}/p*.jpg"], ["depth"], tmp_path / "two", batch=2, **settings)
    assert {"p1/depth.png", "p2/depth.npy", "p3/depth.tokens.npy", "overview.png"} <= files(tmp_path / "all")
    for key in ("p1", "p2", "p3"):
        one, two = (np.load(tmp_path / f / key / "depth.tokens.npy") for f in ("all", "two"))
        assert one.tolist() == two.tolist()


def test_variations_of_one_input_differ_and_their_seed_brings_them_back(studio: Studio, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(studio, ["caption=a red cone"], ["depth"], tmp_path / out, count=4, seed=seed, temperature=5.0)
    rows = {
        out: [np.load(tmp_path / out / f"000-{i}" / "depth.tokens.npy").tolist() for i in range(4)] for out in "abc"
    }
    assert rows["a"] == rows["b"] != rows["c"]
    assert len({tuple(row) for row in rows["a"]}) > 1


def test_grid_known_in_part_and_begun_text_are_completed(studio: Studio, tmp_path: Path) -> None:
    np.save(tmp_path / "part.npy", np.array([3, -1, -1, 9]))
    run(studio, [f"tok_depth={tmp_path / 'part.npy'}", "caption=a red"], ["depth", "caption"], tmp_path / "out")
    tokens = np.load(tmp_path / "out" / "depth.tokens.npy").tolist()
    assert (tokens[0], tokens[3]) == (3, 9)
    assert (tmp_path / "out" / "caption.txt").read_text().startswith("a red")


def test_plan_file_says_everything(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "targets:\n"
        "  - {name: depth, order: maskgit, steps: 3, temperature: 1.5, guidance: {rgb: 2, caption: -0.5}}\n"
        "  - {name: caption, conditions: [rgb], top_k: 5}\n"
    )
    sources = [f"rgb={studio.photo}", "det=[]"]
    with pytest.raises(ValueError, match="tok_depth: condition 'tok_caption' is neither given nor generated before it"):
        run(studio, sources, [], tmp_path / "out", plan=str(tmp_path / "plan.yaml"))
    run(studio, [*sources, "caption=a box"], ["depth"], tmp_path / "out", plan=str(tmp_path / "plan.yaml"))
    (plan,) = json.loads((tmp_path / "out" / "generate.json").read_text())["plan"]
    assert (plan["order"], plan["steps"], plan["guidance"]) == ("maskgit", 3, {"rgb": 2.0, "tok_caption": -0.5})
    (tmp_path / "plan.yaml").write_text("- {name: depth, stepz: 3}\n")
    with pytest.raises(ValueError, match="unknown key 'stepz'; did you mean 'steps'"):
        run(studio, sources, [], tmp_path / "out", plan=str(tmp_path / "plan.yaml"))


def test_files_come_from_and_go_to_object_storage(studio: Studio, tmp_path: Path, s3_uri: str) -> None:
    store = open_store(s3_uri)
    store.create("photos/p.jpg", studio.photo.read_bytes())
    for _ in range(2):  # what an earlier run wrote is replaced
        run(studio, [f"rgb={s3_uri}/photos/p.jpg"], ["depth"], f"{s3_uri}/out")
    run(studio, [f"rgb={studio.photo}"], ["depth"], tmp_path)
    assert store.get("out/depth.png") == (tmp_path / "depth.png").read_bytes()
    assert store.head("out/overview.png") is not None


# ------------------------------------------------------------------------------------------------- tokenizers


def test_description_says_what_made_the_tokens_and_their_labels(studio: Studio) -> None:
    told = json.loads((Path(studio.checkpoint) / "tokenizers.json").read_text())
    assert set(told["tokenizers"]) == set(studio.tokenizers), "pixels have none"
    depth = told["tokenizers"]["tok_depth"]
    assert depth["options"] == {"kind": "spatial", "checkpoint": str(studio.folder / "depth")}
    assert depth["digest"] == studio.tokenizers["tok_depth"].checkpoint.digest
    assert (depth["source"], depth["spec"]["vocabulary"], depth["spec"]["grid"]) == ("depth", 16, [2, 2])
    assert depth["labels"]["lineage"] == {"class": "Teacher"}
    assert depth["labels"]["spec"]["convention"] == "metric"


def test_run_without_a_description_is_understood_from_its_dataset(studio: Studio, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(studio.checkpoint) / name).read_bytes())
    with pytest.raises(ValueError, match=r"does not say what tokenizes it; name its tokenizer with --tokenizer depth="):
        load_tokenizers(tmp_path, studio.model.architecture).get("tok_depth")
    (tmp_path / "pretrain.json").write_text(json.dumps({"dataset": studio.dataset}))
    found = load_tokenizers(tmp_path, studio.model.architecture).get("tok_depth")
    assert found.tokenizer.checkpoint.location == str(studio.folder / "depth")


def test_other_weights_are_refused_unless_the_user_names_them(studio: Studio, tmp_path: Path, caplog: Any) -> None:
    other = write_checkpoint(tmp_path / "depth", checkpoint_config("depth", 1, encoder_blocks=2))
    told = json.loads((Path(studio.checkpoint) / "tokenizers.json").read_text())
    told["tokenizers"]["tok_depth"]["options"]["checkpoint"] = str(other)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(studio.checkpoint) / name).read_bytes())
    (tmp_path / "tokenizers.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="are not those that made the tokens"):
        load_tokenizers(tmp_path, studio.model.architecture).get("tok_depth")
    found = load_tokenizers(tmp_path, studio.model.architecture, [f"depth={other}"]).get("tok_depth")
    assert len(found.notes) == 1
    assert "are not those that made the tokens" in caplog.text


def test_description_from_a_stranger_names_no_code(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "tokenizers.json").write_text(
        json.dumps({"format": 1, "tokenizers": {"tok_depth": {"options": {"kind": "os:system", "checkpoint": "x"}}}})
    )
    with pytest.raises(ValueError, match="its tokenizer is not known"):
        load_tokenizers(tmp_path, studio.model.architecture).get("tok_depth")


def test_tokenizer_of_another_size_is_refused(studio: Studio, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "depth", checkpoint_config("depth", 1, codebook_size=32))
    with pytest.raises(ValueError, match="4 tokens of 32 ids, the model 4 of 16; name its tokenizer with --tokenizer"):
        load_tokenizers(studio.checkpoint, studio.model.architecture, [f"depth={other}"]).get("tok_depth")


# ------------------------------------------------------------------------------------------------- published


@pytest.fixture
def published_4m7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint and tokenizers in ml-4m's formats with ml-4m's names; 32 pixels stand for 224."""
    monkeypatch.setitem(published.VIT_SIZES, "vit_tiny", (64, 2, 4))
    for source, channels, labels in (("depth", 1, None), ("semseg", 16, 6), ("clip", 8, None), ("normal", 3, None)):
        config = {
            **tiny_tokenizers.PUBLISHED,
            "n_channels": channels,
            "n_labels": labels,
            "patch_proj": source != "clip",
        }
        network = tiny_tokenizers.settled(published.translate(config, source))
        tiny_tokenizers.write_published(tmp_path / f"tok_{source}", network, config, "hub")
    (tmp_path / "text").mkdir()
    tiny_sequences.write_vocabulary(tmp_path / "text")
    vocabulary = tiny_sequences.build("tok_caption", tmp_path / "text").vocabulary
    names = ("rgb@224", "caption", "det", "tok_depth@224", "tok_semseg@224", "tok_clip@224", "tok_normal@224")
    infos = {}
    for name in names:
        if name in TEXTS:
            infos[name] = ModalityInfo(kind="sequence", vocabulary=vocabulary, tokens=256)
        elif name == "rgb@224":
            infos[name] = ModalityInfo(kind="pixels", tokens=4, grid=(2, 2))
        else:
            infos[name] = ModalityInfo(kind="grid", vocabulary=64, tokens=4, grid=(2, 2))
    model = seeded(tiny(domains_in=names, domains_out=names[1:], modalities=infos, tie_logits=False))
    (tmp_path / "model").mkdir()
    save_model(model, open_store(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("fourmill", None)  # ml-4m's own have no such part
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_published_checkpoint_and_tokenizers_generate_from_their_folders(published_4m7: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(helpers.make_png(50, 40, seed=2))
    assert set(load_model(published_4m7 / "model").architecture.names) >= {"rgb@224", "caption", "tok_depth@224"}
    labels = ("depth", "semseg", "clip", "normal")
    places = [f"{label}={published_4m7 / f'tok_{label}'}" for label in labels]
    places[0] = places[0].replace("depth=", "tok_depth@224=", 1)
    lines: list[str] = []
    run_generate(
        str(published_4m7 / "model"),
        [f"rgb={photo}", "caption=a red cone"],
        [*labels, "det"],
        str(tmp_path / "out"),
        [*places, f"text={published_4m7 / 'text'}"],
        Options(steps=2, guidance=2.0),
        lines.append,
    )
    made = files(tmp_path / "out")
    assert {f"{label}.png" for label in (*labels, "det")} <= made
    assert np.load(tmp_path / "out" / "depth.npy").shape == (32, 32), "4M's depth is relative: 32 pixels stand for 224"
    assert np.load(tmp_path / "out" / "clip.npy").shape == (8, 2, 2)
    assert {"semseg.npy", "det.json", "overview.png"} <= made


def test_published_model_knows_its_tokenizers_by_name(published_4m7: Path) -> None:
    found = load_tokenizers(published_4m7 / "model", load_model(published_4m7 / "model").architecture)
    assert found.options("tok_depth@224") == {
        "kind": "spatial",
        "checkpoint": "EPFL-VILAB/4M_tokenizers_depth_8k_224-448",
    }
    with pytest.raises(ValueError, match=r"name its vocabulary with --tokenizer caption=PATH, or that of all texts"):
        found.get("caption")


@pytest.mark.parametrize(
    ("name", "label", "token", "source"),
    [
        ("tok_depth@224", "depth", "tok_depth", "depth"),
        ("caption", "caption", "tok_caption", "caption"),
        ("tok_sam_edge@224", "sam_edge", "tok_canny_edge", "canny_edge"),
        ("tok_dinov2_global", "dinov2_global", "tok_dinov2_global", "dinov2_global"),
        ("rgb@224", "rgb", "tok_rgb", "rgb"),
    ],
)
def test_names_of_a_modality(name: str, label: str, token: str, source: str) -> None:
    assert (label_name(name), token_name(name), source_name(name)) == (label, token, source)


def test_names_mean_what_the_model_has() -> None:
    known = ["rgb@224", "tok_rgb@224", "tok_depth@224", "tok_depth@448", "caption", "tok_semseg@448"]
    assert [resolve_name(n, known) for n in ("rgb", "tok_rgb", "caption", "semseg", "tok_depth@448")] == [
        "rgb@224",
        "tok_rgb@224",
        "caption",
        "tok_semseg@448",
        "tok_depth@448",
    ]
    with pytest.raises(ValueError, match="'depth' can be tok_depth@224 or tok_depth@448: give the whole name"):
        resolve_name("depth", known)
    with pytest.raises(ValueError, match="unknown modality 'dpeth'; did you mean 'depth'"):
        resolve_name("dpeth", known)


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        (["rgb=PHOTO"], ["dpeth"], "unknown target 'dpeth'; did you mean 'depth'"),
        (["rgb=PHOTO"], ["metadata"], "unknown target 'metadata'; known: caption, clip, depth"),
        (["rbg=PHOTO"], ["depth"], "unknown input 'rbg'; did you mean 'rgb'"),
        (["PHOTO"], ["depth"], "give NAME=VALUE, such as rgb=photo.jpg"),
        (["rgb=FOLDER/nothing.jpg"], ["depth"], "there is no file .*nothing.jpg"),
        (["rgb=FOLDER/model/config.json"], ["depth"], "the picture cannot be read: not an image"),
        (["depth=FOLDER/ten.npy"], ["normal"], "tok_depth: 10 tokens a sample, the model has 4"),
        (["depth=FOLDER/large.npy"], ["normal"], r"tok_depth: ids 99\.\.99; the model knows 0\.\.15"),
        (["depth=FOLDER/cube.npy"], ["normal"], r"a depth of shape \(2, 2, 2\); \(H, W\) is needed"),
        (["det=no boxes"], ["depth"], "neither a .json file nor JSON"),
        ([], ["depth"], "no inputs: give at least one --from"),
        (["rgb=PHOTO"], [], "no targets: give --to"),
        (["rgb=PHOTO"], ["depth", "depth"], "'tok_depth' is twice among the targets"),
        (["rgb=PHOTO", "rgb=PHOTO", "caption=a", "caption=b", "caption=c"], ["depth"], "2 values beside 3 of another"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    studio: Studio, tmp_path: Path, sources: list[str], targets: list[str], message: str
) -> None:
    np.save(studio.folder / "ten.npy", np.zeros(10, np.int64))
    np.save(studio.folder / "large.npy", np.full(4, 99))
    np.save(studio.folder / "cube.npy", np.zeros((2, 2, 2), np.float32))
    given = [s.replace("PHOTO", str(studio.photo)).replace("FOLDER", str(studio.folder)) for s in sources]
    with pytest.raises(ValueError, match=message):
        run(studio, given, targets, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_on_the_command_line() -> None:
    assert (_weights(None), _weights("2"), _weights("rgb=2,depth=-0.5")) == (None, 2.0, {"rgb": 2.0, "depth": -0.5})
    with pytest.raises(ValueError, match="--guidance 'much'"):
        _weights("much")


def test_command_gives_exit_codes(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from fourmill import cli

    common = ["fourmill", "generate", "-c", studio.checkpoint, "--from", f"rgb={studio.photo}", "-o", str(tmp_path)]
    for arguments, code in ((["--to", "depth"], 0), (["--to", "dpeth"], 2), (["--steps", "0"], 2)):
        monkeypatch.setattr(sys, "argv", [*common, *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
    assert "did you mean 'depth'" in capsys.readouterr().err
