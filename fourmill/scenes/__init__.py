"""Procedural image-text corpus of ray-cast rooms, with exact truth for every label.

    from fourmill.scenes import render, write_corpus
    scene = render(seed=7, index=0, size=224)
    write_corpus("corpus", count=2000, size=224, seed=7, truth=True)

numpy and Pillow only (and pyarrow for the corpus's tables). Invariant: (seed, index) determines the scene.
"""

from __future__ import annotations

from fourmill.scenes.corpus import write_corpus
from fourmill.scenes.picture import Camera, Scene, SceneObject, render
from fourmill.scenes.world import CLASSES, RGB, ROOM_RGB, SHAPES, TEXTURES

__all__ = [
    "CLASSES",
    "RGB",
    "ROOM_RGB",
    "SHAPES",
    "TEXTURES",
    "Camera",
    "Scene",
    "SceneObject",
    "render",
    "write_corpus",
]
