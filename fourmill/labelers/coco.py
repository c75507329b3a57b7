"""The classes of COCO's panoptic segmentation, in the order that 4M's semantic maps number them; things and stuff.

Invariant: a class's place in `CLASSES` is its id in a `semseg_coco` map of 4M: things 0..79, stuff 80..132, 255 void.
(ml-4m reads those maps with one added to each id, so that void wraps to 0, and colours them by detectron2's contiguous
panoptic ids, which are the positions in COCO's own category list.) Checkpoints number classes as they like, so ids are
matched by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from fourmill import scenes

THINGS: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
STUFF: tuple[str, ...] = (
    "banner", "blanket", "bridge", "cardboard", "counter", "curtain", "door-stuff", "floor-wood", "flower", "fruit",
    "gravel", "house", "light", "mirror-stuff", "net", "pillow", "platform", "playingfield", "railroad", "river",
    "road", "roof", "sand", "sea", "shelf", "snow", "stairs", "tent", "towel", "wall-brick", "wall-stone", "wall-tile",
    "wall-wood", "water-other", "window-blind", "window-other", "tree-merged", "fence-merged", "ceiling-merged",
    "sky-other-merged", "cabinet-merged", "table-merged", "floor-other-merged", "pavement-merged", "mountain-merged",
    "grass-merged", "dirt-merged", "paper-merged", "food-other-merged", "building-other-merged", "rock-merged",
    "wall-other-merged", "rug-merged",
)  # fmt: skip
CLASSES: tuple[str, ...] = THINGS + STUFF

# ADE20K's 150 classes have the same order everywhere, but synonyms for names ('window', 'windowpane'): known by the
# first six, and their stuff by id (Mask2Former's ADE20K panoptic task).
_ADE20K = ("wall", "building", "sky", "floor", "tree", "ceiling")
_ADE20K_STUFF = (
    0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77, 79,
    84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145,
)  # fmt: skip
_CITYSCAPES_THINGS = {"person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"}
_CITYSCAPES = {"road", "sidewalk", "building", "pole", "vegetation", "terrain", "sky"} | _CITYSCAPES_THINGS


def four_m_ids(names: Sequence[str]) -> list[int]:
    """4M's id of each of a checkpoint's classes. ValueError for a name that is none of COCO's 133."""
    ids = {name: number for number, name in enumerate(CLASSES)}
    if strange := [name for name in names if name not in ids]:
        raise ValueError(
            f"class_map coco_4m: {len(strange)} of {len(names)} classes are not COCO's, among them {strange[0]!r}; "
            "a checkpoint trained on COCO panoptic is needed"
        )
    return [ids[name] for name in names]


def stuff_ids(names: Sequence[str]) -> frozenset[int] | None:
    """Which of a checkpoint's classes are stuff, for the data sets that are known here; None for others."""
    if set(names) == set(CLASSES):
        return frozenset(i for i, name in enumerate(names) if name in STUFF)
    if len(names) == 150 and tuple(names[: len(_ADE20K)]) == _ADE20K:
        return frozenset(_ADE20K_STUFF)
    if tuple(names) == scenes.CLASSES:
        return frozenset(i for i, name in enumerate(names) if name not in scenes.SHAPES)
    if len(names) == 19 and set(names) >= _CITYSCAPES:
        return frozenset(i for i, name in enumerate(names) if name not in _CITYSCAPES_THINGS)
    return None
