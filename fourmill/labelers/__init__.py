"""The table of labelers: name in a configuration -> class. Adding one is a file, a line here, and a test."""

from fourmill.pipeline.registry import Registry

LABELERS = Registry(
    "labeler",
    {
        "depth": "fourmill.labelers.depth:DepthLabeler",
        "semseg": "fourmill.labelers.semseg:SemsegLabeler",
        "clip": "fourmill.labelers.clip:ClipLabeler",
        "caption": "fourmill.labelers.caption:CaptionLabeler",
        "crop_settings": "fourmill.labelers.crop_settings:CropSettings",
        "annotated_boxes": "fourmill.labelers.annotated_boxes:AnnotatedBoxes",
    },
)
