"""The table of labelers: name in a configuration -> class. Adding one is a file, a line here, and a test."""

from fourmill.pipeline.registry import Registry

LABELERS = Registry(
    "labeler",
    {
        "depth": "fourmill.labelers.depth:DepthLabeler",
        "normal": "fourmill.labelers.normal:NormalLabeler",
        "normal_from_depth": "fourmill.labelers.normal_from_depth:NormalFromDepth",
        "dense_prediction": "fourmill.labelers.dense_prediction:DensePredictionLabeler",
        "segmentation": "fourmill.labelers.segmentation:SegmentationLabeler",
        "detection": "fourmill.labelers.detection:DetectionLabeler",
        "clip": "fourmill.labelers.clip:ClipLabeler",
        "sam": "fourmill.labelers.sam:SamLabeler",
        "caption": "fourmill.labelers.caption:CaptionLabeler",
        "canny_edge": "fourmill.labelers.canny_edge:CannyEdge",
        "color_palette": "fourmill.labelers.color_palette:ColorPalette",
        "metadata": "fourmill.labelers.metadata:Metadata",
        "crop_settings": "fourmill.labelers.crop_settings:CropSettings",
        "annotated_boxes": "fourmill.labelers.annotated_boxes:AnnotatedBoxes",
    },
)
