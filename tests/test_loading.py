"""What all teachers share: naming and loading checkpoints, precision, memory layout, compilation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dense
import tiny_objects
import tiny_words
import torch
from safetensors.torch import load_file, save_file

from fourmill.checkpoints import resolve
from fourmill.labelers import LABELERS
from fourmill.labelers.base import Teacher
from fourmill.pipeline.component import Batch


def batch(count: int = 3, size: int = 48) -> Batch:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Batch([f"k{i}" for i in range(count)], pixels)


def depth(folder: Path, **options: Any) -> Teacher:
    made = LABELERS.build("depth", {"checkpoint": str(folder), "output": "inverse", **options})
    assert isinstance(made, Teacher)
    made.load("cpu")
    return made


@pytest.mark.parametrize(
    ("save", "held", "taker"),
    [
        (tiny_dense.save_dpt, "DPTForDepthEstimation", "depth"),
        (tiny_dense.save_mask2former, "Mask2FormerForUniversalSegmentation", "segmentation"),
        (tiny_dense.save_segformer, "SegformerForSemanticSegmentation", "segmentation"),
        (tiny_objects.save_detr, "DetrForObjectDetection", "detection"),
        (tiny_objects.save_sam, "SamModel", "sam"),
        (tiny_words.save_blip, "BlipForConditionalGeneration", "caption"),
    ],
)
def test_wrong_checkpoint_says_what_it_holds_and_which_labeler_takes_it(
    tmp_path: Path, save: Callable[[Path], Path], held: str, taker: str
) -> None:
    folder = str(save(tmp_path / "net"))
    asked = "detection" if taker != "detection" else "segmentation"
    other = LABELERS.build(asked, {"checkpoint": folder})
    with pytest.raises(
        ValueError, match=f"holds {held}, which the labeler '{asked}' does not take; the labeler '{taker}'"
    ):
        other.load("cpu")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("demo:dpeth", "no checkpoint 'demo:dpeth': .* beside it: caption, clip, depth"),
        ("./nowhere", "not a folder, and a hub id would be 'owner/name'"),
        ("just-a-word", "not a folder, and a hub id would be 'owner/name'"),
    ],
)
def test_unknown_checkpoint_is_refused_saying_what_was_looked_for(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(reference)


def test_bare_file_of_weights_is_a_checkpoint_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    one, other = tmp_path / "a.pth", tmp_path / "b.pth"
    one.write_bytes(b"weights")
    other.write_bytes(b"weights")
    first, second = resolve(str(one)), resolve(str(other))
    assert (first.location, first.licence, first.is_local) == (str(one), "mit", True)
    assert first.digest == second.digest
    other.write_bytes(b"other weights")
    assert resolve(str(other)).digest != first.digest


def test_unexpected_weights_are_listed_and_the_rest_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_dense.save_dpt(tmp_path / "dpt")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "head.spare.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "fourmill.labelers"):
        made = depth(folder).run(batch())["depth"]
    assert len(made) == 3
    assert f"{folder}: 1 weights are not used: head.spare.weight" in caplog.text


def test_missing_weights_are_fatal_and_counted(tmp_path: Path) -> None:
    folder = tiny_dense.save_dpt(tmp_path / "dpt")
    weights = load_file(folder / "model.safetensors")
    gone = sorted(weights)[:2]
    save_file(
        {k: v for k, v in weights.items() if k not in gone}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=f"lacks 2 weights of DPT: {gone[0]}, {gone[1]}"):
        depth(folder)


def test_half_precision_products_stay_near_float32_and_labels_are_float32(tmp_path: Path) -> None:
    folder = tiny_dense.save_dpt(tmp_path / "dpt")
    exact = np.stack(depth(folder).run(batch())["depth"])
    half = np.stack(depth(folder, precision="bfloat16").run(batch())["depth"])
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()  # bfloat16 has 8 bits: it must differ, a little


def test_default_precision_on_a_cpu_is_exact_float32(tmp_path: Path) -> None:
    folder = tiny_dense.save_dpt(tmp_path / "dpt")
    made = [np.stack(depth(folder, precision=p).run(batch())["depth"]) for p in ("auto", "float32")]
    np.testing.assert_array_equal(*made)


def test_half_precision_convolutions_lie_channels_last(tmp_path: Path) -> None:
    folder = tiny_dense.save_dpt(tmp_path / "dpt")

    def layouts(teacher: Any) -> set[bool]:
        wide = [m.weight for m in teacher.model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] > 1]
        return {w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in wide}

    assert layouts(depth(folder)) == {False}
    assert True in layouts(depth(folder, precision="bfloat16"))


def test_pictures_go_to_the_device_as_bytes(tmp_path: Path) -> None:
    strided = batch(2)
    assert strided.pixels is not None
    wide = Batch(
        strided.keys, strided.pixels.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    )  # as the worker stacks
    found = depth(tiny_dense.save_dpt(tmp_path / "dpt")).on_device(wide)
    assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)
    np.testing.assert_array_equal(found.numpy(), strided.pixels)


@pytest.mark.slow  # the compiler takes a minute
def test_compiled_network_gives_the_same_labels_in_batches_of_one_size(tmp_path: Path) -> None:
    folder = tiny_dense.save_dpt(tmp_path / "dpt")
    compiled = depth(folder, compile=True, batch_size=3)
    assert compiled.fixed_batches
    made = np.stack(compiled.run(batch())["depth"])
    exact = np.stack(depth(folder).run(batch())["depth"])
    # Fused kernels add in another order: 5e-6 of a value were seen where values are large.
    np.testing.assert_allclose(made, exact, rtol=0, atol=5e-5 * np.abs(exact).max())
