"""The objects of a scene as segments and boxes, from its maps of classes and of instances.

Shape legend: S side of the picture, K objects of a picture.
Invariant: boxes are the extents of the instance masks; every visible object is listed once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fourmill.scenes import CLASSES, SHAPES

STUFF = tuple(number for number, name in enumerate(CLASSES) if name not in SHAPES)


def segments(semantic: NDArray[np.uint8], instances: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], list[int]]:
    """Masks (K, S, S) and classes (K) of a picture's objects and, after them, of the background's visible classes."""
    numbers = [int(n) for n in np.unique(instances) if n]
    masks = [instances == number for number in numbers]
    classes = [int(semantic[mask][0]) for mask in masks]
    for stuff in STUFF:
        area = semantic == stuff
        if area.any():
            masks.append(area)
            classes.append(stuff)
    return np.stack(masks), classes


def boxes(semantic: NDArray[np.uint8], instances: NDArray[np.uint8]) -> tuple[NDArray[np.float32], list[int]]:
    """Boxes (K, 4) as half-open (xmin, ymin, xmax, ymax) pixels and shapes (K), indices into `SHAPES`."""
    found, kinds = [], []
    for number in np.unique(instances):
        if number:
            rows, columns = np.nonzero(instances == number)
            found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            kinds.append(int(semantic[rows[0], columns[0]]) - len(STUFF))
    return np.array(found, np.float32).reshape(-1, 4), kinds
