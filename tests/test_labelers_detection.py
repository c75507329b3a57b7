"""Detection: every detector family on small checkpoints of its real class, against its own library and the truth."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_objects import DETECTORS, NAMES, save_detr, save_maskrcnn, save_yolos

from fourmill.labelers import LABELERS
from fourmill.modalities import modality
from fourmill.pipeline import masks
from fourmill.pipeline.component import Batch, Component, Failure
from fourmill.pipeline.conventions import check
from fourmill.pipeline.geometry import CropConfig, apply_crop, draw_crops
from fourmill.scenes import CLASSES, render

SIZE = 48  # not the networks' own 56 or 64


def pictures(size: int = SIZE) -> Batch:
    """Three photographs of different sizes and shapes, cropped as the worker does."""
    crops = []
    for index, (width, height) in enumerate([(90, 60), (50, 120), (33, 33)]):
        photo = Image.fromarray(render(99, index, 128).image).resize((width, height))
        crops.append(apply_crop(photo, draw_crops(str(index), height, width, CropConfig())[0], size))
    return Batch(["a", "b", "c"], np.stack(crops).transpose(0, 3, 1, 2))


def labeler(checkpoint: Path | str, **options: Any) -> Any:
    component: Component = LABELERS.build("detection", {"checkpoint": str(checkpoint), **options})
    component.load("cpu")
    return component


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("detectors")
    return {name: save(folder / name) for name, save in DETECTORS.items()}


@pytest.fixture(scope="module")
def maskrcnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_maskrcnn(tmp_path_factory.mktemp("torchvision") / "maskrcnn")


@pytest.mark.parametrize("family", list(DETECTORS))
def test_each_family_finds_what_its_library_finds_in_each_picture_alone(family: str, saved: dict[str, Path]) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(saved[family]).eval()
    processor = AutoImageProcessor.from_pretrained(saved[family])
    made = labeler(saved[family], score_threshold=0.02)
    batch = pictures()
    for picture, found in zip(batch.pixels, made.run(batch)["det"], strict=True):  # type: ignore[arg-type]
        inputs = processor(images=torch.from_numpy(picture), return_tensors="pt")
        if family == "yolos":
            inputs.pop("pixel_mask", None)
        with torch.inference_mode():
            outputs = model(**inputs)
        (expected,) = processor.post_process_object_detection(outputs, 0.02, target_sizes=[(SIZE, SIZE)])
        order = expected["scores"].argsort(descending=True, stable=True)
        assert len(found) == len(order) > 0
        np.testing.assert_allclose([o["score"] for o in found], expected["scores"][order], atol=1e-4)
        boxes = (expected["boxes"][order] / SIZE).clamp(0, 1)
        np.testing.assert_allclose([o["box"] for o in found], boxes, atol=1e-3)
        assert [o["class_name"] for o in found] == [NAMES[int(i)] for i in expected["labels"][order]]
        check(modality("det"), made.spec("det"), found)


@pytest.mark.parametrize("family", ["detr", "conditional_detr", "yolos"])
def test_bfloat16_moves_no_box_by_half_a_pixel_at_224(family: str, saved: dict[str, Path]) -> None:
    """With box heads in bfloat16 too, these move by up to 0.6 to 0.9 pixels. Networks that choose their queries by
    score are left out: the choice may differ."""
    boxes = []
    for precision in ("float32", "bfloat16"):
        made = labeler(saved[family], precision=precision)
        inputs = torch.from_numpy(pictures(64).pixels) / 255
        with torch.inference_mode(), made.autocast():
            boxes.append(made.detector.model(pixel_values=inputs).pred_boxes)
    assert boxes[1].dtype == torch.float32
    assert 0 < (boxes[0] - boxes[1]).abs().max() < 0.5 / 224


class Truth:
    """A network that knows the scenes: their boxes as its raw outputs, in place of a DETR's."""

    def __init__(self, boxes_BQ4: torch.Tensor, logits_BQC: torch.Tensor) -> None:
        self.outputs = SimpleNamespace(pred_boxes=boxes_BQ4, logits=logits_BQC)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.outputs

    __call__ = forward


def test_network_that_knows_the_scenes_gives_exactly_their_boxes(saved: dict[str, Path]) -> None:
    """Units, corners, order, names: any mistake between the network's outputs and the label moves a number here."""
    scenes = [render(99, i, SIZE) for i in range(4)]
    boxes, logits = torch.zeros(4, 6, 4), torch.full((4, 6, 3), -9.0)  # six queries
    ids = {name: i for i, name in NAMES.items()}
    shown = [[o for o in s.objects if o.class_name in ids] for s in scenes]
    for row, objects in enumerate(shown):
        for query, thing in enumerate(objects):
            x0, y0, x1, y1 = (edge / SIZE for edge in thing.box)
            boxes[row, query] = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
            logits[row, query, ids[thing.class_name]] = 3.0 - query
    made = labeler(saved["rt_detr_v2"])
    made.detector.model = Truth(boxes, logits)
    made.detector._inputs = {"pixel_values"}
    pixels = np.stack([s.image for s in scenes]).transpose(0, 3, 1, 2)
    found = made.run(Batch(list("abcd"), pixels))["det"]
    assert sum(map(len, shown)) >= 4
    for objects, things in zip(found, shown, strict=True):
        assert [o["class_name"] for o in objects] == [t.class_name for t in things]
        np.testing.assert_allclose(np.array([o["box"] for o in objects]) * SIZE, [t.box for t in things], atol=1e-4)
        scores = torch.sigmoid(3.0 - torch.arange(len(things)).float())
        np.testing.assert_allclose([o["score"] for o in objects], scores, atol=1e-6)


def fixed(saved: dict[str, Path], boxes: list[list[float]], logits: list[list[float]], **options: Any) -> Any:
    """A labeler whose network gives these raw outputs (cx, cy, w, h) for one picture, and what it makes of them."""
    made = labeler(saved["rt_detr_v2"], **options)
    made.detector.model = Truth(torch.tensor([boxes]), torch.tensor([logits]))
    made.detector._inputs = {"pixel_values"}
    pixels = np.zeros((1, 3, SIZE, SIZE), np.uint8)
    return made, made.run(Batch(["a"], pixels))["det"][0]


def test_boxes_are_clipped_and_those_without_area_in_the_crop_are_dropped_and_counted(saved: dict[str, Path]) -> None:
    boxes = [[0.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.5], [1.5, 0.5, 0.5, 0.5]]
    made, found = fixed(saved, boxes, [[2.0, -9, -9], [1.0, -9, -9], [0.5, -9, -9]])
    assert [o["box"] for o in found] == [[0.0, 0.25, 0.25, 0.75]]
    assert made.take_notes() == ["detection: dropped 2 detections: the box has no area in the crop"]
    assert made.take_notes() == []


def test_best_come_first_above_the_threshold_and_no_more_than_asked(saved: dict[str, Path]) -> None:
    boxes = [[0.5, 0.5, 0.2, 0.2]] * 4
    logits = [[-1.0, -9, -9], [1.0, -9, -9], [-9, 0.0, -9], [-3.0, -9, -9]]
    assert [o["score"] for o in fixed(saved, boxes, logits)[1]] == [0.731059, 0.5, 0.268941]  # -3: 0.047
    assert [o["score"] for o in fixed(saved, boxes, logits, max_detections=2)[1]] == [0.731059, 0.5]
    assert [o["score"] for o in fixed(saved, boxes, logits, score_threshold=0.6)[1]] == [0.731059]


def test_suppression_is_off_unless_asked_for_and_keeps_classes_apart(saved: dict[str, Path]) -> None:
    boxes = [[0.5, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]
    logits = [[1.0, -9, -9], [2.0, -9, -9], [-9, 0.0, -9]]
    assert len(fixed(saved, boxes, logits)[1]) == 3
    kept = fixed(saved, boxes, logits, nms_iou=0.5)[1]
    assert [(o["class_name"], o["score"]) for o in kept] == [("sphere", 0.880797), ("box", 0.5)]


def test_outputs_that_are_not_numbers_are_a_failure_of_that_picture_alone(saved: dict[str, Path]) -> None:
    made = labeler(saved["rt_detr_v2"])
    logits = torch.zeros(2, 1, 3)
    logits[1, 0, 0] = float("nan")
    made.detector.model = Truth(torch.full((2, 1, 4), 0.5), logits)
    made.detector._inputs = {"pixel_values"}
    found = made.run(Batch(["a", "b"], np.zeros((2, 3, SIZE, SIZE), np.uint8)))["det"]
    assert len(found[0]) == 1
    assert found[1] == Failure("not finite: the network gave NaN")


def test_classes_may_be_renamed_but_not_invented(saved: dict[str, Path]) -> None:
    made = labeler(saved["detr"], rename={"sphere": "ball"})
    assert made.spec("det").classes == ("ball", "box", "cone")
    with pytest.raises(ValueError, match=r"rename: unknown class 'spere'; did you mean 'sphere'\?"):
        labeler(saved["detr"], rename={"spere": "ball"}).spec("det")


def relabelled(folder: Path, names: list[str]) -> Path:
    from transformers import AutoConfig

    save_detr(folder)
    config = AutoConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(names))
    config.save_pretrained(folder)
    return folder


def test_checkpoint_without_class_names_is_refused_until_they_are_given(tmp_path: Path) -> None:
    folder = relabelled(tmp_path / "net", ["LABEL_0", "LABEL_1", "LABEL_2"])
    with pytest.raises(ValueError, match=r"does not name its 3 classes .*rename: \{LABEL_0: person"):
        labeler(folder).spec("det")
    assert labeler(folder, rename={"LABEL_1": "person"}).spec("det").classes == ("person",)


def test_detections_of_a_class_that_has_only_a_placeholder_are_dropped_and_counted(tmp_path: Path) -> None:
    made = labeler(relabelled(tmp_path / "net", ["N/A", "person", "LABEL_2"]))
    made.detector.model = Truth(torch.full((1, 3, 4), 0.5), 9 * torch.eye(3, 4)[None])  # DETR: a fourth for nothing
    made.detector._inputs = {"pixel_values"}
    (found,) = made.run(Batch(["a"], np.zeros((1, 3, SIZE, SIZE), np.uint8)))["det"]
    assert [o["class_name"] for o in found] == ["person"]
    assert made.dropped == {"class 0 has no name": 1, "class 2 has no name": 1}


def test_detectron2_checkpoints_are_refused_naming_what_to_use(tmp_path: Path) -> None:
    (tmp_path / "model_final_f05665.pkl").write_bytes(b"\x80\x04.")
    for reference in ("detectron2://ViTDet/COCO/cascade_mask_rcnn_vitdet_h/model_final.pkl", str(tmp_path)):
        with pytest.raises(ValueError, match=r"is a detectron2 checkpoint .*no loader for it. Use RT-DETR, D-FINE"):
            labeler(reference)


def test_masks_are_refused_where_the_network_has_none(saved: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="has boxes only; masks come from torchvision's Mask R-CNN"):
        labeler(saved["detr"], masks=True)


def test_checkpoint_of_another_task_names_the_labeler_that_takes_it() -> None:
    with pytest.raises(ValueError, match="which the labeler 'detection' does not take; the labeler 'depth' takes it"):
        labeler("demo:depth")


def test_maskrcnn_gives_torchvisions_boxes_and_masks(maskrcnn: Path) -> None:
    import torchvision

    made = labeler(maskrcnn, masks=True, max_detections=20)
    batch = pictures().select([1])
    found = made.run(batch)
    reference = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=64, box_detections_per_img=20
    ).eval()
    reference.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(maskrcnn / "w.safetensors").items()}
    )
    with torch.inference_mode():
        (expected,) = reference([torch.from_numpy(batch.pixels[0]) / 255])  # type: ignore[index]
    boxes = (expected["boxes"] / SIZE).clamp(0, 1)
    np.testing.assert_allclose([o["box"] for o in found["det"][0]], boxes, atol=1e-4)
    np.testing.assert_allclose([o["score"] for o in found["det"][0]], expected["scores"], atol=1e-5)
    for name in ("det", "instance"):
        for objects in found[name]:
            assert {o["class_name"] for o in objects} <= set(NAMES.values())
            check(modality(name), made.spec(name), objects)
    solid = [m for m in (expected["masks"][:, 0] > 0.5).numpy() if m.any()]
    assert len(solid) == len(found["instance"][0]) > 0
    shared = [(masks.decode(o["mask"]) == m).mean() for o, m in zip(found["instance"][0], solid, strict=True)]
    assert min(shared) > 0.999


def test_weights_without_a_mask_branch_are_a_faster_rcnn(maskrcnn: Path, tmp_path: Path) -> None:
    weights = {k: v for k, v in load_file(maskrcnn / "w.safetensors").items() if ".mask_" not in k}
    torch.save(weights, tmp_path / "faster.pth")
    (tmp_path / "config.json").write_text((maskrcnn / "config.json").read_text())
    with pytest.raises(ValueError, match="is a Faster R-CNN, which has no masks"):
        labeler(tmp_path, masks=True)
    made = labeler(tmp_path)
    batch = pictures().select([0])
    assert made.run(batch) == labeler(maskrcnn).run(batch)


def test_ninety_one_nameless_classes_are_coco_as_torchvision_numbers_it(tmp_path: Path) -> None:
    save_file({"roi_heads.box_predictor.cls_score.weight": torch.zeros(91, 8)}, tmp_path / "w.safetensors")
    classes = LABELERS.build("detection", {"checkpoint": str(tmp_path)}).spec("det").classes or ()
    assert (len(classes), classes[:2], classes[-1]) == (80, ("person", "bicycle"), "toothbrush")
    save_file({"roi_heads.box_predictor.cls_score.weight": torch.zeros(5, 8)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="has 5 classes, COCO as torchvision numbers it has 91: name them by id2label"):
        LABELERS.build("detection", {"checkpoint": str(tmp_path)}).spec("det")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text('{"id2label": {"1": "cat"}}')
    with pytest.raises(ValueError, match=r"holds no weights of torchvision's fasterrcnn_resnet50_fpn_v2 .*conv.weight"):
        labeler(tmp_path)


def test_pickled_code_in_a_weights_file_is_not_executed(tmp_path: Path) -> None:
    import pickle

    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Touch()))
    (tmp_path / "config.json").write_text('{"id2label": {"1": "cat"}}')
    with pytest.raises(ValueError, match=r"w\.pth holds more than tensors, which is not loaded"):
        labeler(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_detections_fit_in_one_batch_as_in_several(tmp_path: Path) -> None:
    made = labeler(save_yolos(tmp_path / "yolos"))
    batch = pictures()
    together, alone = made.run(batch)["det"], [made.run(batch.select([i]))["det"][0] for i in range(3)]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose([o["box"] for o in one], [o["box"] for o in other], atol=1e-5)


def test_scenes_have_only_classes_that_the_demo_detector_names() -> None:
    assert set(NAMES.values()) < set(CLASSES)


def test_demo_detector_finds_the_objects_of_scenes_that_it_has_not_seen() -> None:
    """COCO's average precision, 24 scenes. The committed weights have 0.94 at IoU 0.5 and 0.92 at 0.75 (64 scenes)."""
    from torchmetrics.detection import MeanAveragePrecision

    scenes = [render(99, i, 128) for i in range(24)]
    made = labeler("demo:detection", batch_size=24)
    found = made.run(Batch([str(i) for i in range(24)], np.stack([s.image for s in scenes]).transpose(0, 3, 1, 2)))
    ids = {name: i for i, name in enumerate(made.spec("det").classes)}
    precision = MeanAveragePrecision()
    for objects, scene in zip(found["det"], scenes, strict=True):
        boxes = 128 * torch.tensor([o["box"] for o in objects])
        labels = torch.tensor([ids[o["class_name"]] for o in objects])
        prediction = {"boxes": boxes, "scores": torch.tensor([o["score"] for o in objects]), "labels": labels}
        truth = torch.tensor([o.box for o in scene.objects], dtype=torch.float32)
        names = torch.tensor([ids[o.class_name] for o in scene.objects])
        precision.update([prediction], [{"boxes": truth, "labels": names}])
    figures = precision.compute()
    assert figures["map_50"] > 0.85
    assert figures["map_75"] > 0.75


def full_size(family: str) -> tuple[Any, Any]:
    """A network of the published size with random weights, and its processor."""
    import transformers as t

    stages = ["stage3", "stage6", "stage9", "stage12"]
    dinov2 = t.RfDetrDinov2Config(hidden_size=384, num_attention_heads=6, image_size=560, out_features=stages)
    networks = {
        "rt_detr_v2": lambda: (t.RTDetrV2ForObjectDetection(t.RTDetrV2Config()), t.RTDetrImageProcessor()),  # R50, 640
        "d_fine": lambda: (t.DFineForObjectDetection(t.DFineConfig()), t.RTDetrImageProcessor()),  # L, 640
        "deimv2": lambda: (t.Deimv2ForObjectDetection(t.Deimv2Config()), t.RTDetrImageProcessor()),  # 640
        "rf_detr": lambda: (
            t.RfDetrForObjectDetection(t.RfDetrConfig(backbone_config=dinov2)),
            t.RfDetrImageProcessor(size={"height": 560, "width": 560}),
        ),  # base
        "detr": lambda: (t.DetrForObjectDetection(t.DetrConfig()), t.DetrImageProcessor()),  # R50, 800
        "conditional_detr": lambda: (
            t.ConditionalDetrForObjectDetection(t.ConditionalDetrConfig()),
            t.ConditionalDetrImageProcessor(),
        ),
        "deformable_detr": lambda: (
            t.DeformableDetrForObjectDetection(t.DeformableDetrConfig()),
            t.DeformableDetrImageProcessor(),
        ),
        "yolos": lambda: (t.YolosForObjectDetection(t.YolosConfig()), t.YolosImageProcessor()),  # base
    }
    return networks[family]()


@pytest.mark.slow
@pytest.mark.parametrize("family", list(DETECTORS))
def test_full_size_network_of_each_family_loads_and_runs(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = full_size(family)
    assert sum(p.numel() for p in model.parameters()) > 20e6
    model.config.id2label = {i: f"thing {i}" for i in range(model.config.num_labels)}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    del model
    made = labeler(tmp_path, score_threshold=0.0)
    (found,) = made.run(pictures(224).select([0]))["det"]
    assert 0 < len(found) <= 100
    check(modality("det"), made.spec("det"), found)
