"""ml-4m's layout: read by a plain reader, by ml-4m's own loader where a checkout is given (FOURMILL_ML4M), and imported
from folders that others have made."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exchange_toys as toys
import numpy as np
import pytest
from PIL import Image

from benchmarks.loader_ml4m import stand_ins
from fourmill.pipeline import images
from fourmill.pipeline.exchange import (
    ExportOptions,
    ExportReport,
    ImportOptions,
    ReadOptions,
    WrongDataError,
    export_dataset,
    import_dataset,
    ml4m_values,
)
from fourmill.pipeline.geometry import Crop
from fourmill.pipeline.manifest import read_manifest
from fourmill.pipeline.store import open_store

KEYS = [key for keys in toys.KEYS for key in keys if key != "dark"]  # dark has no depth
FOLDERS = ["caption", "color_palette", "crop_settings", "det", "metadata", "rgb", "tok_clip_global", "tok_depth@32"]
INDEX = {key: i for i, key in enumerate(k for keys in toys.KEYS for k in keys)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dataset in ml-4m's three forms."""
    root = tmp_path_factory.mktemp("ml4m")
    dataset = toys.make(str(root / "dataset"))
    for layout in ("ml4m", "ml4m-files", "ml4m-crops"):
        export(dataset, root / layout, layout)
    return root


def export(dataset: str, out: Path, layout: str) -> ExportReport:
    return export_dataset(dataset, str(out), ExportOptions(layout, workers=2))


def plain(folder: Path) -> dict[str, tuple[str, bytes]]:
    """A modality's files by key, in order: of tars, or of folders."""
    found: dict[str, tuple[str, bytes]] = {}
    for tar_path in sorted(folder.glob("*.tar")):
        with tarfile.open(tar_path) as tar:
            for member in tar:
                stem, _, extension = member.name.partition(".")
                found[stem] = extension, tar.extractfile(member).read()  # type: ignore[union-attr]
    for path in sorted(folder.glob("*/*")):
        found[path.stem] = path.suffix[1:], path.read_bytes()
    return found


@pytest.mark.parametrize("layout", ["ml4m", "ml4m-files"])
def test_a_plain_reader_finds_ml4ms_files_aligned_and_complete(root: Path, layout: str) -> None:
    folders = sorted(p.name for p in (root / layout).iterdir() if p.is_dir() and not p.name.startswith("."))
    assert folders == [*FOLDERS, "tok_rgb@32"]
    files = {name: plain(root / layout / name) for name in folders}
    assert len({tuple(found) for found in files.values()}) == 1
    assert len(files["rgb"]) == 11
    stem, key = "s%C3%B6tnos", "sötnos"
    tokens = np.load(io.BytesIO(files["tok_rgb@32"][stem][1]))
    assert (tokens.dtype, tokens.shape) == (np.int16, (2, 4))
    assert np.array_equal(tokens[1], toys.value("tok_rgb", INDEX[key], 1))
    assert np.load(io.BytesIO(files["tok_clip_global"][stem][1])).dtype == np.int32
    crops = np.load(io.BytesIO(files["crop_settings"][stem][1]))
    assert (crops.dtype, crops.tolist()) == (np.int64, [[0, 4, 40, 40, 0], [3, 2, 30, 33, 1]])
    assert files["caption"][stem] == ("json", b'{"caption": "caption 2"}')
    assert files["rgb"][stem] == ("jpg", toys.jpeg(2))
    instances = json.loads(files["det"][stem][1])["instances"]
    assert [i["class_name"] for i in instances] == ["box", "ball"]
    # crop 0 is 40 x 40 at (0, 4) of 48 x 40: x0 = (4 + 0.125 * 40) / 48
    assert instances[0]["boxes"] == pytest.approx([9 / 48, 0.25, 24 / 48, 0.75])
    palettes = json.loads(files["color_palette"][stem][1])
    assert [len(palettes[0][str(n)]) for n in range(1, 8)] == [1, 2, 3, 3, 3, 3, 3]
    assert json.loads(files["metadata"][stem][1])["n_humans"] == 2


def test_shard_numbers_are_contiguous_and_the_same_in_every_folder(root: Path) -> None:
    wanted = [f"shard-0000{n}.tar" for n in range(3)]
    for folder in FOLDERS:
        assert sorted(p.name for p in (root / "ml4m" / folder).iterdir()) == wanted


def test_pictures_that_ml4m_would_see_turned_are_written_upright(root: Path) -> None:
    extension, data = plain(root / "ml4m" / "rgb")["a%2Fb%2Ec"]
    assert extension == "png"
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (40, 48)
        assert np.array_equal(np.asarray(image), np.asarray(images.decode(toys.turned_jpeg(1))))


def test_crops_hold_maps_beside_the_picture_they_were_made_from(root: Path) -> None:
    files = {p.name: plain(p) for p in (root / "ml4m-crops").iterdir() if (p / "shard-00000.tar").exists()}
    assert {"depth", "normal", "semseg_coco", "canny_edge", "rgb", "tok_rgb@32"} <= {*files}
    depth = np.asarray(Image.open(io.BytesIO(files["depth"]["cat"][1]))) / 65535
    truth = toys.value("depth", 0, 0).astype(np.float16).astype(np.float64)
    assert np.abs(depth * truth.max() - truth).max() < truth.max() * 1.001 * 2**-17
    normal = np.asarray(Image.open(io.BytesIO(files["normal"]["cat"][1]))).astype(float) / 127.5 - 1
    assert np.abs(normal.transpose(2, 0, 1) - toys.value("normal", 0, 0)).max() < 0.005
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(files["semseg_coco"]["cat"][1]))), toys.value("semseg", 0, 0)
    )
    assert Image.open(io.BytesIO(files["rgb"]["cat"][1])).size == (32, 32)
    assert np.load(io.BytesIO(files["crop_settings"]["cat"][1])).tolist() == [[0, 0, 32, 32, 0]]
    assert np.load(io.BytesIO(files["tok_rgb@32"]["cat"][1])).shape == (1, 4)
    assert json.loads(files["det"]["cat"][1])["instances"][0]["boxes"] == [0.125, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("layout", ["ml4m", "ml4m-files"])
def test_what_comes_back_from_ml4m_is_what_went_out(root: Path, tmp_path: Path, layout: str) -> None:
    import_dataset(str(root / layout), str(tmp_path / "back"))
    names = ("caption", "color_palette", "crop_settings", "det", "metadata", "tok_clip_global", "tok_depth", "tok_rgb")
    truth = toys.values_of(str(root / "dataset"), names)
    kept = {name: {k: v for k, v in samples.items() if k in KEYS} for name, samples in truth.items()}
    found = toys.values_of(str(tmp_path / "back"))
    order = list(found["rgb"])
    if layout == "ml4m":
        assert order == KEYS
        assert found["rgb"]["cat"] == [toys.jpeg(0)]
    sorted_by_key = {n: dict(sorted(found[n].items())) for n in names}
    toys.assert_equal(sorted_by_key, {n: dict(sorted(v.items())) for n, v in kept.items()})


def test_crops_come_back_within_their_stated_errors(root: Path, tmp_path: Path) -> None:
    import_dataset(str(root / "ml4m-crops"), str(tmp_path / "back"))
    found = toys.values_of(str(tmp_path / "back"))
    truth = toys.value("depth", 0, 0).astype(np.float16).astype(np.float32)
    assert np.abs(found["depth"]["cat"][0] - truth).max() <= truth.max() * 2**-10
    back = found["normal"]["cat"][0]
    cosine = (back * toys.value("normal", 0, 0)).sum(axis=0) / np.linalg.norm(back, axis=0)
    assert cosine.min() > 0.9999
    for name in ("semseg", "canny_edge", "tok_rgb", "det"):
        assert toys.same(found[name]["cat"][0], toys.values_of(str(root / "dataset"), (name,))[name]["cat"][0])
    assert read_manifest(open_store(tmp_path / "back")).totals("depth").quarantined == {}


def test_boxes_of_a_mirrored_crop_stand_where_they_are_in_the_picture() -> None:
    own = json.dumps([{"box": [0.0, 0.5, 0.25, 1.0], "class_name": "cat", "score": 1.0}])
    _, data, _ = ml4m_values.boxes([own], [[8, 4, 16, 20, 1]], toys.jpeg(0))
    # mirrored back: 0.75..1 of 20 pixels from 4 is 19..24 of 48; 0.5..1 of 16 from 8 is 16..24 of 40
    assert json.loads(data)["instances"][0]["boxes"] == pytest.approx([19 / 48, 16 / 40, 24 / 48, 24 / 40])
    back = ml4m_values.read_boxes({"instances": json.loads(data)["instances"]}, [[8, 4, 16, 20, 1]], toys.jpeg(0))
    assert back == [json.loads(own)]


# --- anyone's folder ------------------------------------------------------------------------------------------------


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


DET = {"instances": [{"boxes": [0.25, 0.25, 0.5, 0.5], "class_name": "cat", "score": 0.9}]}
CROPS = [[0, 4, 40, 40, 0], [0, 0, 20, 24, 1]]


def sample(index: int) -> dict[str, tuple[str, bytes]]:
    """By ml-4m's folder: what one sample has in a set that ml-4m's own scripts made."""
    return {
        "rgb": ("jpg", toys.jpeg(index)),
        "caption": ("json", json.dumps([{"caption": f"text {index}"}, {"caption": "other"}]).encode()),
        "det": ("json", json.dumps(DET).encode()),
        "crop_settings": ("npy", npy(CROPS)),
        "tok_depth@224": ("npy", npy(np.full((2, 196), index, np.int16))),
        "color_palette": ("json", json.dumps([{"1": [[1, 2, 3]]}]).encode()),
    }


def write_tars(root: Path, split: str, shards: list[list[int]], folders: list[str] | None = None) -> None:
    for number, indices in enumerate(shards):
        for folder in folders or sample(0):
            path = root / split / folder / f"shard-{number:05d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for index in indices:
                    extension, data = sample(index)[folder]
                    info = tarfile.TarInfo(f"{index:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_files(root: Path, split: str, indices: list[int]) -> None:
    for index in indices:
        for folder, (extension, data) in sample(index).items():
            path = root / split / folder / f"class_{index % 2}" / f"{index:04d}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def bring_in(src: Path, back: Path, **options: Any) -> Any:
    return import_dataset(str(src), str(back), ImportOptions(ReadOptions(**options), workers=2))


def test_a_foreign_folder_with_train_and_val_becomes_a_dataset(tmp_path: Path) -> None:
    write_tars(tmp_path / "src", "train", [[0, 1], [2]])
    write_tars(tmp_path / "src", "val", [[0]])
    report = bring_in(tmp_path / "src", tmp_path / "back", rename={"caption": "alt_text"})
    assert (report.samples, report.shards, report.quarantined, report.ok) == (4, 3, {}, True)
    found = toys.values_of(str(tmp_path / "back"))
    assert list(found["rgb"]) == ["train/0000", "train/0001", "train/0002", "val/0000"]
    assert found["rgb"]["train/0001"] == [toys.jpeg(1)]
    assert found["alt_text"]["train/0002"] == ["text 2"]
    assert [t.tolist() for t in found["tok_depth"]["train/0001"]] == [[1] * 196] * 2
    record = next(read_manifest(open_store(tmp_path / "back")).records("tok_depth"))
    assert record.spec == {"crops": 2, "vocabulary": 8192, "length": 196, "grid": [14, 14]}
    # the box in pixels of 48 x 40 is 12..24, 10..20; crop 1 is 24 x 20 at (0, 0), mirrored
    moved = Crop(*CROPS[1]).boxes(np.array([[0.25, 0.25, 0.5, 0.5]]), 40, 48)[0][0]
    assert found["det"]["val/0000"][1] == [{"box": moved.tolist(), "class_name": "cat", "score": 0.9}]
    assert found["det"]["val/0000"][1][0]["box"] == pytest.approx([0.0, 0.5, 0.5, 1.0])
    assert found["color_palette"]["val/0000"] == [{"1": [[1, 2, 3]]}] * 2


def test_a_foreign_folder_of_single_files_is_paired_by_name(tmp_path: Path) -> None:
    write_files(tmp_path / "src", "", [0, 1, 2, 3, 4])
    report = bring_in(tmp_path / "src", tmp_path / "back", shard_size=2)
    assert (report.samples, report.shards) == (5, 3)
    found = toys.values_of(str(tmp_path / "back"))
    assert list(found["rgb"]) == ["0000", "0002", "0004", "0001", "0003"]  # class by class
    assert all(int(v[0][0]) == int(k) for k, v in found["tok_depth"].items())


def test_keys_that_every_tar_counts_from_zero_stay_apart(tmp_path: Path) -> None:
    write_tars(tmp_path / "src", "", [[0, 1], [0]])
    report = bring_in(tmp_path / "src", tmp_path / "back")
    assert report.renamed == 1
    assert list(toys.values_of(str(tmp_path / "back"))["rgb"]) == ["0000", "0001", "0000~2"]


def test_a_modality_that_diverges_is_named_with_the_samples(tmp_path: Path) -> None:
    write_tars(tmp_path / "src", "", [[0, 1, 2]])
    write_tars(tmp_path / "src", "", [[0, 2]], ["tok_depth@224"])
    with pytest.raises(WrongDataError, match=r"shard-00000: 1 samples of .* are not in tok_depth \('0001'\)"):
        bring_in(tmp_path / "src", tmp_path / "back")
    assert not (tmp_path / "back" / "manifest").exists()
    report = bring_in(tmp_path / "src", tmp_path / "back", keep_misaligned=True)
    assert (report.samples, report.quarantined, report.ok) == (3, {"tok_depth: missing": 1}, False)
    found = toys.values_of(str(tmp_path / "back"))
    assert found["tok_depth"]["0001"] == [None, None]
    assert int(found["tok_depth"]["0002"][0][0]) == 2


def test_another_order_of_the_same_samples_is_refused(tmp_path: Path) -> None:
    write_tars(tmp_path / "src", "", [[0, 1]])
    write_tars(tmp_path / "src", "", [[1, 0]], ["rgb"])
    with pytest.raises(WrongDataError, match=r"has the samples of .* in another order: row 0 is"):
        bring_in(tmp_path / "src", tmp_path / "back")


def test_a_shard_that_one_folder_lacks_is_named(tmp_path: Path) -> None:
    write_tars(tmp_path / "src", "", [[0], [1]])
    (tmp_path / "src" / "det" / "shard-00001.tar").unlink()
    with pytest.raises(WrongDataError, match="shard-00001 is not in det"):
        bring_in(tmp_path / "src", tmp_path / "back")


def test_folders_that_are_no_modality_are_refused_by_name_or_skipped(tmp_path: Path) -> None:
    write_tars(tmp_path / "src", "", [[0]])
    for folder, why in (("tok_dpth@224", "did you mean 'tok_depth'"), ("sam_instance", "a pickle"), ("t5_caption", "")):
        (tmp_path / "src" / folder).mkdir()
        (tmp_path / "src" / folder / "shard-00000.tar").write_bytes(b"")
        with pytest.raises(ValueError, match=f"folder '{folder}'.*{why}"):
            bring_in(tmp_path / "src", tmp_path / "back")
        assert bring_in(tmp_path / "src", tmp_path / f"back-{folder}", skip_unknown=True).skipped.keys() == {folder}
        (tmp_path / "src" / folder / "shard-00000.tar").unlink()
        (tmp_path / "src" / folder).rmdir()


def test_one_bad_value_is_a_null_with_a_reason_and_its_neighbours_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {
        "rgb": ("jpg", b"no picture"),
        "caption": ("json", b"[1]"),
        "det": ("json", b'{"instances": [{"boxes": [0, 0, 1]}]}'),
        "tok_depth@224": ("npy", npy(np.full((2, 196), 9000, np.int16))),
        "color_palette": ("json", json.dumps([{"1": [[1, 2, 999]]}]).encode()),
    }
    whole = sample
    monkeypatch.setitem(globals(), "sample", lambda i: {**whole(i), **(bad if i == 1 else {})})
    write_tars(tmp_path / "src", "", [[0, 1, 2]])
    report = bring_in(tmp_path / "src", tmp_path / "back")
    assert report.quarantined == {
        "caption: unreadable": 1,
        "color_palette: bad colour": 1,
        "det: unreadable": 1,
        "rgb: unreadable": 1,
        "tok_depth: unreadable": 1,
    }
    found = toys.values_of(str(tmp_path / "back"))
    assert [[found[n][k][0] is None for k in found[n]] for n in ("rgb", "det", "tok_depth")] == [
        [False, True, False]
    ] * 3
    assert found["color_palette"]["0001"] == [None, None]
    assert "9000" in toys.reasons_of(str(tmp_path / "back"), "tok_depth")["0001"]


def test_maps_of_whole_pictures_are_cut_to_each_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.tile(np.linspace(0, 65535, 48), (40, 1)).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    whole = sample
    monkeypatch.setitem(globals(), "sample", lambda i: {**whole(i), "depth": ("png", file.getvalue())})
    write_tars(tmp_path / "src", "", [[0]])
    bring_in(tmp_path / "src", tmp_path / "back", map_size=20)
    first, second = toys.values_of(str(tmp_path / "back"))["depth"]["0000"]
    assert first.shape == second.shape == (20, 20)
    assert first[0, 0] < first[0, -1]
    assert second[0, 0] > second[0, -1]  # crop 1 is mirrored
    assert second[0, -1] == pytest.approx(0, abs=0.03)


# --- ml-4m's own loader ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fourm(request: pytest.FixtureRequest) -> Iterator[types.SimpleNamespace]:
    """ml-4m's own modules from a checkout. Of OpenCV and albumentations, which it pins and we do not need, the three
    calls on boxes are stood in for."""
    checkout = os.environ.get("FOURMILL_ML4M")
    if not checkout:
        pytest.skip("FOURMILL_ML4M names no checkout of apple/ml-4m")
    for name in ("webdataset", "braceexpand", "einops", "datasets"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(checkout)
        for name, module in stand_ins().items():
            if name not in sys.modules:
                patch.setitem(sys.modules, name, module)
        names = {
            "setup": "pretrain_utils",
            "data": "unified_datasets",
            "info": "modality_info",
            "augmenter": "image_augmenter",
        }
        yield types.SimpleNamespace(**{k: importlib.import_module(f"fourm.data.{m}") for k, m in names.items()})
        for name in [n for n in sys.modules if n == "fourm" or n.startswith("fourm.")]:
            del sys.modules[name]


DOMAINS = ("rgb@32", "caption", "det", "metadata", "color_palette", "tok_rgb@32", "tok_depth@32")


def modality_info(fourm: types.SimpleNamespace) -> dict[str, Any]:
    """ml-4m's own table, with the toys' two sizes of tokens and one budget for all."""
    table = fourm.info.MODALITY_INFO
    sizes = {"rgb@32": "rgb@224", "tok_rgb@32": "tok_rgb@224", "tok_depth@32": "tok_depth@224"}
    info = {name: dict(table[sizes.get(name, name)]) for name in DOMAINS}
    for name, entry in info.items():
        entry.update(input_alphas=[1.0], target_alphas=[1.0], keep=["random"])
        if name in sizes:
            entry.update(input_size=32, max_tokens=4)
    return info


def arguments(fourm: types.SimpleNamespace) -> dict[str, Any]:
    from tokenizers import Tokenizer

    folder = Path(os.environ["FOURMILL_ML4M"]) / "fourm" / "utils" / "tokenizer" / "trained"
    return {
        "all_domains": list(DOMAINS),
        "modality_info": modality_info(fourm),
        "modality_transforms": dict(fourm.info.MODALITY_TRANSFORMS),
        "image_augmenter": fourm.augmenter.PreTokenizedImageAugmenter(32, main_domain="rgb@32"),
        "text_tokenizer": Tokenizer.from_file(str(folder / "text_tokenizer_4m_wordpiece_30k.json")),
        "input_tokens_range": (8, 8),
        "target_tokens_range": (8, 8),
    }


def test_ml4ms_training_loader_reads_the_tars(fourm: types.SimpleNamespace, root: Path) -> None:
    folders = "rgb,caption,det,metadata,color_palette,tok_rgb@32,tok_depth@32,crop_settings"
    loader = fourm.data.build_wds_fm_pretraining_dataloader(
        data_path=f"{root / 'ml4m'}/[{folders}]/shard-{{00000..00002}}.tar",
        num_gpus=1,
        num_workers=1,
        batch_size=None,
        epoch_size=None,
        shuffle_buffer_load=1,
        shuffle_buffer_repeat=1,
        n_repeats=1,
        **arguments(fourm),
    )
    known = {tuple(toys.value("tok_rgb", INDEX[k], c)): (k, c) for k in KEYS for c in range(2)}
    seen = set()
    for _, made in zip(range(150), loader, strict=False):
        key, crop = known[tuple(made["tok_rgb@32"]["tensor"].tolist())]
        assert made["tok_depth@32"]["tensor"].tolist() == toys.value("tok_depth", INDEX[key], crop).tolist()
        assert made["rgb@32"]["tensor"].shape == (3, 32, 32)
        seen.add(key)
    assert len(seen) > 8  # it draws shards with replacement


def test_ml4ms_trainer_sets_up_its_batches_from_the_configuration_in_the_card(
    fourm: types.SimpleNamespace, root: Path
) -> None:
    """The calls of run_training_4m's `setup_data`, with `data_path` as the card gives it."""
    card = (root / "ml4m" / "README.md").read_text()
    data_path = next(line.split("'")[1] for line in card.splitlines() if line.startswith("data_path:"))
    settings = {
        "type": "multimodal",
        "use_wds": True,
        "data_path": data_path.replace("HERE", str(root / "ml4m")),
        "in_domains": "-".join(DOMAINS),
        "out_domains": "-".join(DOMAINS[1:]),
        "input_alphas": "1.0",
        "target_alphas": "1.0",
        "main_augment_domain": "rgb@32",
        "wds_shuffle_buffer_tar": 10,
        "wds_shuffle_buffer_repeat": 10,
    }
    own = arguments(fourm)
    info, weights = fourm.setup.setup_sampling_mod_info(settings, own["modality_info"])
    for entry in info.values():
        entry["keep"] = ["random"]
    loader = fourm.setup.get_train_dataloader(
        settings, info, weights, own["text_tokenizer"], 32, 8, 8, 8, 8, num_tasks=1, num_workers=1
    )
    mixture = fourm.data.MixtureDataset([loader], [1.0], info)
    samples = [made for _, made in zip(range(4), mixture, strict=False)]
    assert {*samples[0]} == {*DOMAINS}
    assert {tuple(made["rgb@32"]["tensor"].shape) for made in samples} == {(3, 32, 32)}
    visible = [sum(int((~made[d]["input_mask"]).sum()) for d in DOMAINS) for made in samples]
    assert all(0 < count <= 8 for count in visible)


def test_ml4ms_folder_loader_reads_the_files_in_step(fourm: types.SimpleNamespace, root: Path) -> None:
    data = fourm.data.build_fm_pretraining_dataset(data_path=str(root / "ml4m-files"), **arguments(fourm))
    assert len(data) == 11
    known = {tuple(toys.value("tok_rgb", INDEX[k], c)): (k, c) for k in KEYS for c in range(2)}
    keys = []
    for index in range(len(data)):
        made = data[index]
        key, crop = known[tuple(made["tok_rgb@32"]["tensor"].tolist())]
        assert made["tok_depth@32"]["tensor"].tolist() == toys.value("tok_depth", INDEX[key], crop).tolist()
        keys.append(key)
    assert sorted(keys) == sorted(KEYS)


def test_ml4ms_transforms_give_the_texts_that_the_labels_say(fourm: types.SimpleNamespace, root: Path) -> None:
    """Boxes, captions, facts and colours through ml-4m's own transforms, at the crop that its augmenter chose."""
    random.seed(0)
    transforms = {**fourm.info.MODALITY_TRANSFORMS, "__key__": fourm.data.IdentityTransform()}
    unified = fourm.data.UnifiedDataTransform(
        transforms, fourm.augmenter.PreTokenizedImageAugmenter(32, no_aug=True, main_domain="rgb")
    )
    names = ["rgb", "caption", "det", "metadata", "color_palette", "crop_settings"]
    stem = "cat"
    loaded = {}
    for name in names:
        extension, data = plain(root / "ml4m-files" / name)[stem]
        path = root / "ml4m-files" / name / "shard-00000" / f"{stem}.{extension}"
        assert path.read_bytes() == data
        own = fourm.data.CropSettingsTransform() if name == "crop_settings" else transforms[name]
        loaded[name] = own.load(str(path))
    made = unified(loaded)
    assert made["caption"] == "caption 0"
    boxes = sorted(toys.value("det", 0, 0), key=lambda o: o["box"][0] ** 2 + o["box"][1] ** 2)
    words = [
        f"v{i}={round(999 * v)}" if i < 4 else v for o in boxes for i, v in enumerate([*o["box"], o["class_name"]])
    ]
    assert made["det"] == " ".join(words)
    assert sorted(made["metadata"]) == ["v1=0 v0=1", "v1=10 v0=2", "v1=5 v0=0"]
    count = int(made["color_palette"].split()[0].removeprefix("v1="))
    assert len(made["color_palette"].split()) == 1 + 3 * count
