"""Class maps, panoptic segments and instances: against the libraries' processors, hand-made masks and true scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_helpers import Gives, labeler, mixed_batch, pictures_of, scenes
from safetensors.torch import load_file, save_file
from tiny_dense import (
    NAMES,
    SEMANTIC,
    UNIVERSAL,
    save_dpt,
    save_eomt,
    save_mask2former,
    save_maskformer,
    save_oneformer,
    save_segformer,
    save_tips,
    save_tips_dense,
)

from fourmill.labelers import LABELERS, coco, segmentation
from fourmill.labelers.loading import process
from fourmill.labelers.segments import instances_of, panoptic_of
from fourmill.modalities import modality
from fourmill.pipeline import conventions, masks
from fourmill.pipeline.measures import confusion, mean_iou
from fourmill.pipeline.shards import Spec
from fourmill.scenes import CLASSES, Scene

ALL = ["semseg", "panoptic", "instance"]
ROOM = ("floor", "wall")


def forward(made: Any, batch: Any, task: str | None = None) -> Any:
    options = {"task_inputs": [task] * len(batch)} if task else {}
    with torch.inference_mode():
        return made.model(**process(made.processor, made.on_device(batch), **options))


@pytest.mark.parametrize("family", [*SEMANTIC, *UNIVERSAL])
def test_class_maps_equal_the_processors_own_for_a_batch_of_mixed_sizes(tmp_path: Path, family: str) -> None:
    made, batch = labeler("segmentation", (SEMANTIC | UNIVERSAL)[family](tmp_path / family)), mixed_batch()
    outputs = forward(made, batch, "semantic" if family == "oneformer" else None)
    expected = made.processor.post_process_semantic_segmentation(outputs, target_sizes=[(40, 40)] * 3)
    found = made.run(batch)["semseg"]
    assert [(m.shape, m.dtype) for m in found] == [((40, 40), np.dtype(np.uint8))] * 3
    assert len(np.unique(found)) > 1
    np.testing.assert_array_equal(np.stack(found), torch.stack(list(expected)).numpy())
    assert made.spec("semseg").classes == ("cat", "dog", "sky", "sea")


@pytest.mark.parametrize("family", UNIVERSAL)
def test_every_universal_family_gives_segments_and_instances_that_keep_the_conventions(
    tmp_path: Path, family: str
) -> None:
    loose = {"threshold": 0.0, "overlap_threshold": 0.0, "stuff": ["sky", "sea"]}
    made = labeler("segmentation", UNIVERSAL[family](tmp_path / family), outputs=ALL, **loose)
    found = made.run(mixed_batch())
    assert list(found) == ALL
    assert any(found["panoptic"])
    assert any(found["instance"])
    for name in ALL:
        for value in found[name]:
            conventions.check(modality(name), made.spec(name), value)


@pytest.mark.parametrize("family", [*SEMANTIC, *UNIVERSAL])
def test_half_precision_changes_few_classes(tmp_path: Path, family: str) -> None:
    folder, batch = (SEMANTIC | UNIVERSAL)[family](tmp_path / family), mixed_batch()
    exact, half = (
        np.stack(labeler("segmentation", folder, precision=p).run(batch)["semseg"]) for p in ("float32", "bfloat16")
    )
    assert (half != exact).mean() < 0.2


def test_panoptic_segments_equal_eomts_own_processor(tmp_path: Path) -> None:
    """EoMT's is the only processor that follows the paper; the others differ in what their docstring says."""
    options = {"threshold": 0.2, "overlap_threshold": 0.05, "stuff": ["sky", "sea"]}
    made, batch = labeler("segmentation", save_eomt(tmp_path / "eomt"), outputs=["panoptic"], **options), mixed_batch()
    its = made.processor.post_process_panoptic_segmentation(
        forward(made, batch), [(40, 40)] * 3, threshold=0.2, overlap_mask_area_threshold=0.05, stuff_classes=[2, 3]
    )
    compared = 0
    for segments, expected in zip(made.run(batch)["panoptic"], its, strict=True):
        ids = expected["segmentation"].numpy()
        want = {(NAMES[s["label_id"]], (ids == s["id"]).tobytes()) for s in expected["segments_info"]}
        assert {(s["class_name"], masks.decode(s["mask"]).tobytes()) for s in segments} == want
        compared += len(want)
    assert compared >= 3


def test_one_forward_pass_serves_all_outputs_and_oneformer_runs_once_for_each(tmp_path: Path) -> None:
    for save, passes in ((save_mask2former, 1), (save_oneformer, 3)):
        made = labeler("segmentation", save(tmp_path / save.__name__), outputs=ALL, stuff=["sky"])
        calls: list[Any] = []
        made.model.register_forward_pre_hook(lambda _m, _a, kwargs, seen=calls: seen.append(kwargs), with_kwargs=True)
        made.run(mixed_batch())
        assert len(calls) == passes
    words = [tuple(call["task_inputs"][0].tolist()) for call in calls]
    assert len(set(words)) == 3  # "the task is semantic", panoptic, instance


# Hand-made masks: what a network of two stuff and two thing classes would say.

LOGIT = 9.0


def said(size: int, queries: Sequence[tuple[int, float, Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One picture's class logits (1, Q, 5) and mask logits (1, Q, size, size): (class, probability, rows of it).

    What is left of the probability is spread evenly over the other classes and none.
    """
    classes, shapes = torch.zeros(1, len(queries), 5), torch.full((1, len(queries), size, size), -LOGIT)
    for i, (label, chance, rows) in enumerate(queries):
        classes[0, i] = float(np.log((1 - chance) / 4))
        classes[0, i, label] = float(np.log(chance))
        shapes[0, i, list(rows)] = LOGIT
    return classes, shapes


def panoptic(queries: Sequence[tuple[int, float, Sequence[int]]], **options: float) -> list[dict[str, Any]]:
    limits = {"threshold": 0.5, "mask_threshold": 0.5, "overlap_threshold": 0.8} | options
    return panoptic_of([said(8, queries)], list(NAMES.values()), frozenset({2, 3}), **limits)[0]


def summary(items: list[dict[str, Any]]) -> list[tuple[str, int, list[float]]]:
    return [(item["class_name"], item["area"], item["box"]) for item in items]


def test_stuff_is_fused_things_are_not_and_the_largest_comes_first() -> None:
    found = panoptic([(2, 0.9, [0]), (0, 0.9, [1, 2]), (2, 0.8, [3, 4]), (0, 0.7, [5]), (3, 0.9, [6, 7])])
    assert summary(found) == [
        ("sky", 24, [0, 0, 1, 0.625]),
        ("cat", 16, [0, 0.125, 1, 0.375]),
        ("sea", 16, [0, 0.75, 1, 1]),
        ("cat", 8, [0, 0.625, 1, 0.75]),
    ]
    assert [item["is_thing"] for item in found] == [False, True, False, True]
    assert [item["score"] for item in found] == pytest.approx([0.9, 0.9, 0.9, 0.7], abs=1e-4)
    assert masks.decode(found[0]["mask"])[:, 0].tolist() == [True, False, False, True, True, False, False, False]
    conventions.check(modality("panoptic"), Spec(), found)


def test_weak_queries_hidden_masks_and_the_null_class_leave_no_segment() -> None:
    assert panoptic([(0, 0.4, [0, 1])]) == []
    assert panoptic([(0, 0.4, [0, 1])], threshold=0.3)[0]["area"] == 16
    assert panoptic([(4, 0.9, [0, 1])]) == []
    # The dog is stronger and covers half of the cat, which keeps less than 0.8 of its mask; nobody gets the rest.
    hidden = [(0, 0.6, [0, 1, 2, 3]), (1, 0.9, [2, 3, 4, 5])]
    assert summary(panoptic(hidden)) == [("dog", 32, [0, 0.25, 1, 0.75])]
    assert [s[0] for s in summary(panoptic(hidden, overlap_threshold=0.5))] == ["dog", "cat"]
    # Pixels of the best query that are outside its mask belong to nobody.
    assert sum(item["area"] for item in panoptic([(0, 0.9, [1])])) == 8


def test_instances_overlap_come_best_first_and_are_never_stuff() -> None:
    queries = [(1, 0.7, [0, 1, 2]), (2, 0.95, [0, 1, 2, 3]), (0, 0.9, [2, 3]), (0, 0.3, [5]), (1, 0.99, [])]
    chunk = said(8, queries)
    found = instances_of([chunk], list(NAMES.values()), frozenset({2, 3}), 0.5, 100)[0]
    assert summary(found) == [("cat", 16, [0, 0.25, 1, 0.5]), ("dog", 24, [0, 0, 1, 0.375])]
    assert [item["score"] for item in found] == pytest.approx([0.9, 0.7], abs=1e-3)
    conventions.check(modality("instance"), Spec(), found)
    without_stuff = instances_of([chunk], list(NAMES.values()), frozenset(), 0.5, 100)[0]
    assert [item["class_name"] for item in without_stuff] == ["sky", "cat", "dog"]
    assert len(instances_of([chunk], list(NAMES.values()), frozenset(), 0.0, 2)[0]) == 1  # the best has an empty mask


def test_pictures_in_chunks_give_what_one_batch_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"outputs": ALL, "stuff": ["sky"], "threshold": 0.0, "overlap_threshold": 0.0}
    made, batch = labeler("segmentation", save_mask2former(tmp_path / "net"), **options), mixed_batch()
    whole = made.run(batch)
    monkeypatch.setattr(segmentation, "_MAX_FLOATS", 1)
    parts = made.run(batch)
    assert whole["panoptic"] == parts["panoptic"]
    assert whole["instance"] == parts["instance"]
    np.testing.assert_array_equal(np.stack(whole["semseg"]), np.stack(parts["semseg"]))


# Networks replaced by the truth of scenes.


def true_queries(scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Class logits (K, C + 1) and mask logits (K, S, S): a query for each object and each part of the room."""
    areas = [(scene.instances == o.instance, CLASSES.index(o.class_name)) for o in scene.objects]
    areas += [(scene.semantic == CLASSES.index(name), CLASSES.index(name)) for name in ROOM]
    shapes = torch.stack([torch.from_numpy(area) for area, _ in areas]).float() * 2 * LOGIT - LOGIT
    classes = torch.full((len(areas), len(CLASSES) + 1), -LOGIT)
    classes[range(len(areas)), [label for _, label in areas]] = LOGIT
    return classes, shapes


def test_true_masks_come_back_as_the_scenes_classes_segments_and_boxes(tmp_path: Path) -> None:
    names = dict(enumerate(CLASSES))
    made = labeler("segmentation", save_maskformer(tmp_path / "net", names), outputs=ALL, stuff=list(ROOM))
    for scene in scenes(4, 96):
        classes, shapes = true_queries(scene)
        made.model = Gives(made.model.config, class_queries_logits=classes[None], masks_queries_logits=shapes[None])
        found = {name: values[0] for name, values in made.run(pictures_of([scene])).items()}
        np.testing.assert_array_equal(found["semseg"], scene.semantic)
        objects = {(o.class_name, tuple(np.round(np.array(o.box) / 96, 6)), o.area) for o in scene.objects}
        for name in ("panoptic", "instance"):
            things = [item for item in found[name] if item.get("is_thing", True)]
            assert {(t["class_name"], tuple(t["box"]), t["area"]) for t in things} == objects
            conventions.check(modality(name), made.spec(name), found[name])
        for item in found["panoptic"]:
            inside = masks.decode(item["mask"])
            assert len(np.unique(scene.instances[inside])) == 1
            assert {CLASSES[i] for i in np.unique(scene.semantic[inside])} == {item["class_name"]}
        assert sum(item["area"] for item in found["panoptic"]) == 96 * 96
        assert {item["class_name"] for item in found["panoptic"] if not item["is_thing"]} <= set(ROOM)


def test_true_scores_of_a_per_pixel_network_come_back_as_its_ids(tmp_path: Path) -> None:
    scene = scenes(1, 64)[0]
    made = labeler("segmentation", save_segformer(tmp_path / "net", dict(enumerate(CLASSES))))
    logits = torch.nn.functional.one_hot(torch.from_numpy(scene.semantic).long(), len(CLASSES)).permute(2, 0, 1)
    made.model = Gives(made.model.config, logits=logits[None].float())
    np.testing.assert_array_equal(made.run(pictures_of([scene]))["semseg"][0], scene.semantic)
    assert made.spec("semseg").classes == CLASSES


# 4M's ids, and which classes are stuff.


def test_cocos_classes_stand_where_4m_expects_them() -> None:
    assert (len(coco.THINGS), len(coco.STUFF), len(set(coco.CLASSES))) == (80, 53, 133)
    known = {0: "person", 16: "dog", 79: "toothbrush", 80: "banner", 100: "road", 116: "tree-merged", 132: "rug-merged"}
    assert {i: coco.CLASSES[i] for i in known} == known


def test_a_checkpoint_numbered_in_another_order_is_renumbered_by_name(tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permutation(133)
    names = {i: coco.CLASSES[j] for i, j in enumerate(shuffled.tolist())}
    folder, batch = save_segformer(tmp_path / "net", names), mixed_batch()
    plain, mapped = labeler("segmentation", folder), labeler("segmentation", folder, class_map="coco_4m")
    own, four_m = np.stack(plain.run(batch)["semseg"]), np.stack(mapped.run(batch)["semseg"])
    np.testing.assert_array_equal(shuffled[own], four_m)
    assert mapped.spec("semseg").classes == coco.CLASSES
    own_names, four_m_names = (made.spec("semseg").classes for made in (plain, mapped))
    assert [own_names[i] for i in own.flat] == [four_m_names[i] for i in four_m.flat]


def test_classes_that_are_not_cocos_have_no_4m_ids(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="class_map coco_4m: 1 of 4 classes are not COCO's, among them 'sky'"):
        labeler("segmentation", save_segformer(tmp_path / "net"), class_map="coco_4m")


def test_stuff_is_known_for_the_common_data_sets_and_asked_for_otherwise(tmp_path: Path) -> None:
    assert coco.stuff_ids(coco.CLASSES) == frozenset(range(80, 133))
    assert coco.stuff_ids(coco.CLASSES[::-1]) == frozenset(range(53))
    ade = ["wall", "building", "sky", "floor", "tree", "ceiling", *map(str, range(144))]
    assert len(coco.stuff_ids(ade) or ()) == 50
    cityscapes = "road sidewalk building wall fence pole traffic-light traffic-sign vegetation terrain sky person rider"
    names = [*cityscapes.split(), "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    assert coco.stuff_ids(names) == frozenset(range(11))
    assert coco.stuff_ids(CLASSES) == frozenset({0, 1})  # floor and wall
    folder = save_mask2former(tmp_path / "net")
    with pytest.raises(ValueError, match=r"which of its 4 classes are stuff is not known; .* cat, dog, sky, sea"):
        labeler("segmentation", folder, outputs=["panoptic"])
    with pytest.raises(ValueError, match="unknown class 'sku'; did you mean 'sky'"):
        labeler("segmentation", folder, outputs=["panoptic"], stuff=["sku"])
    assert labeler("segmentation", folder, outputs=["panoptic"], stuff=[]).stuff == frozenset()


# Loading.


def test_per_pixel_networks_are_refused_where_segments_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SegformerForSemanticSegmentation, which gives class maps only"):
        labeler("segmentation", save_segformer(tmp_path / "net"), outputs=["semseg", "instance"])


def test_checkpoint_of_another_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds DPTForDepthEstimation, .* the labeler 'depth' takes it"):
        labeler("segmentation", save_dpt(tmp_path / "dpt"))


def test_missing_weights_are_fatal_not_random(tmp_path: Path) -> None:
    folder = save_segformer(tmp_path / "net")
    weights = load_file(folder / "model.safetensors")
    weights.pop("decode_head.classifier.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*decode_head.classifier.bias"):
        labeler("segmentation", folder)


@pytest.mark.parametrize("save", [save_segformer, save_mask2former])
def test_half_precision_checkpoint_runs_in_float32(tmp_path: Path, save: Any) -> None:
    folder = save(tmp_path / "net")
    weights = {k: v.half() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    made = labeler("segmentation", folder)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert len(made.run(mixed_batch())["semseg"]) == 3


def test_changed_weights_change_the_lineage_and_moving_them_does_not(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return str(LABELERS.build("segmentation", {"checkpoint": str(folder)}).lineage()["checkpoint"]["digest"])

    folder = save_segformer(tmp_path / "net")
    before = digest(folder)
    folder.rename(tmp_path / "moved")
    moved = digest(tmp_path / "moved")
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    weights["decode_head.classifier.bias"] += 1e-3
    save_file(weights, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    assert before == moved != digest(tmp_path / "moved")


# Depth, normals and classes together.


def test_dense_prediction_equals_the_three_labelers_of_one_checkpoint(tmp_path: Path) -> None:
    folder, batch = save_tips_dense(tmp_path / "dense"), mixed_batch()
    made = labeler("dense_prediction", folder)
    found = made.run(batch)
    assert {name: made.spec(name) for name in made.makes} == {
        "depth": Spec(convention="metric"),
        "normal": Spec(convention="opencv"),
        "semseg": Spec(classes=("cat", "dog", "sky", "sea")),
    }
    depths = labeler("depth", folder, output="metric").run(batch)["depth"]
    normals = labeler("normal", folder).run(batch)["normal"]
    np.testing.assert_allclose(np.stack(found["depth"]), np.stack(depths), rtol=1e-5)
    np.testing.assert_allclose(np.stack(found["normal"]), np.stack(normals), atol=1e-5)
    classes = made.processor.post_process_semantic_segmentation(forward(made, batch), target_sizes=[(40, 40)] * 3)
    np.testing.assert_array_equal(np.stack(found["semseg"]), torch.stack(list(classes)).numpy())


def test_dense_prediction_makes_only_what_is_asked_for(tmp_path: Path) -> None:
    made = labeler("dense_prediction", save_tips_dense(tmp_path / "dense"), outputs=["semseg", "depth"])
    assert made.makes == ("depth", "semseg")
    assert list(made.run(mixed_batch())) == ["depth", "semseg"]


def test_dense_prediction_needs_all_three_heads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds Tipsv2DptForNormalEstimation; dense_prediction takes TIPSv2-DPT"):
        labeler("dense_prediction", save_tips(tmp_path / "tips"))
    with pytest.raises(ValueError, match=r"holds SegformerForSemanticSegmentation; dense_prediction takes"):
        labeler("dense_prediction", save_segformer(tmp_path / "segformer"))


# Demo weights, and published sizes.


def test_demo_semseg_resembles_the_truth_on_the_same_grid() -> None:
    found = scenes(12, 128)
    maps = labeler("segmentation", "demo:semseg").run(pictures_of(found))["semseg"]
    assert mean_iou(np.sum([confusion(m, s.semantic) for m, s in zip(maps, found, strict=True)], axis=0)) > 0.65


def test_demo_panoptic_finds_the_scenes_segments() -> None:
    """Panoptic quality, pooled over classes (Kirillov et al., 2019): overlap of matches; unmatched segments cost."""
    found = scenes(12, 128)
    made = labeler("segmentation", "demo:panoptic", outputs=ALL)
    labels = made.run(pictures_of(found))
    overlaps, count = [], 0
    for segments, scene in zip(labels["panoptic"], found, strict=True):
        conventions.check(modality("panoptic"), made.spec("panoptic"), segments)
        truth = [(o.class_name, scene.instances == o.instance) for o in scene.objects]
        truth += [(name, scene.semantic == CLASSES.index(name)) for name in ROOM]
        truth = [(name, area) for name, area in truth if area.any()]
        for item in segments:
            mask = masks.decode(item["mask"])
            ious = [(mask & a).sum() / (mask | a).sum() for name, a in truth if name == item["class_name"]]
            overlaps += [iou for iou in ious if iou > 0.5]
        count += len(segments) + len(truth)
    assert 2 * sum(overlaps) / count > 0.5
    ids = zip(labels["semseg"], found, strict=True)
    assert mean_iou(np.sum([confusion(m, s.semantic) for m, s in ids], axis=0)) > 0.5
    surplus = []  # the paper's inference has no suppression: one object may be found twice
    for things, scene in zip(labels["instance"], found, strict=True):
        conventions.check(modality("instance"), made.spec("instance"), things)
        assert not {t["class_name"] for t in things} & set(ROOM)
        surplus.append(abs(len(things) - len(scene.objects)))
    assert np.mean(surplus) <= 1.5


def full_mask2former_swin_base(t: Any) -> tuple[Any, Any, list[str]]:
    backbone = t.SwinConfig(
        image_size=384, embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.Mask2FormerConfig(backbone_config=backbone, num_queries=100, id2label=dict(enumerate(coco.CLASSES)))
    processor = t.Mask2FormerImageProcessor(size={"height": 384, "width": 384})
    return t.Mask2FormerForUniversalSegmentation(config), processor, ALL


def full_eomt_large(t: Any) -> tuple[Any, Any, list[str]]:
    config = t.EomtConfig(id2label=dict(enumerate(coco.CLASSES)))
    processor = t.EomtImageProcessor(size={"shortest_edge": 640, "longest_edge": 640}, do_pad=True)
    return t.EomtForUniversalSegmentation(config), processor, ALL


def full_segformer_b5(t: Any) -> tuple[Any, Any, list[str]]:
    config = t.SegformerConfig(
        depths=[3, 6, 40, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768,
        id2label={i: str(i) for i in range(150)},
    )  # fmt: skip
    size = {"height": 640, "width": 640}
    return t.SegformerForSemanticSegmentation(config), t.SegformerImageProcessor(size=size), ["semseg"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("full", [full_mask2former_swin_base, full_eomt_large, full_segformer_b5])
def test_published_architectures_run_at_full_size(tmp_path: Path, full: Any) -> None:
    import transformers

    torch.manual_seed(0)
    model, processor, outputs = full(transformers)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    del model
    found = labeler("segmentation", tmp_path, outputs=outputs).run(pictures_of(scenes(1, 224)))
    assert list(found) == outputs
    assert found["semseg"][0].shape == (224, 224)
