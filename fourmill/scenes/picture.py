"""Renders a scene: a picture with the exact depth, normals, classes, instances, boxes and captions that belong to it.

Invariants: the truth is sampled at pixel centres and never smoothed; boxes equal the extents of the instance masks; the
same (seed, index) is the same scene with the same captions at any size; two calls give identical arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourmill.scenes.captions import describe, summary
from fourmill.scenes.rays import Array
from fourmill.scenes.shading import FIRST_BODY, shade, trace
from fourmill.scenes.world import CAMERA_HEIGHT, CLASSES, FOCAL, World, draw_world, pixel_rays

# Bodies cover at least 1.3 % in a coarse probe; below 16 pixels a side that says too little about the mask.
MIN_SIZE, MAX_SIZE = 16, 4096


@dataclass(frozen=True)
class Camera:
    """Pinhole at the picture's centre: focal length in pixels, height in metres, pitch (down) and yaw in degrees."""

    focal: float
    height: float
    pitch: float
    yaw: float


@dataclass(frozen=True)
class SceneObject:
    """One visible object. `box` is (xmin, ymin, xmax, ymax) in pixels, half-open; `area` its visible pixels.

    `instance` is its number in `Scene.instances`; `centre` its middle in the camera frame, metres; `middle` the
    projection of that centre across the picture, 0 (left) .. 1 (right), the same at any size.
    """

    instance: int
    class_name: str
    colour: str
    texture: str
    material: str
    size: str
    box: tuple[int, int, int, int]
    area: int
    centre: tuple[float, float, float]
    middle: float


@dataclass(frozen=True)
class Scene:
    """A picture (S, S, 3) uint8 and its truth.

    depth (S, S) float32: z along the optical axis, metres. normals (S, S, 3) float32: unit, camera frame (x right,
    y down, z forward), towards the camera. semantic (S, S) uint8: index into `CLASSES`. instances (S, S) uint8:
    0 background, else the object's number. `caption` is one of many phrasings, `summary` always the same plain one.
    `floor` and `wall` are (colour, texture).
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32]
    normals: NDArray[np.float32]
    semantic: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    caption: str
    summary: str
    camera: Camera
    floor: tuple[str, str]
    wall: tuple[str, str]


def render(seed: int, index: int, size: int) -> Scene:
    """Render scene `index` of the endless corpus `seed` as a `size` x `size` picture.

    Raises ValueError for a negative seed or index and for a size outside 16..4096.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative: seed={seed}, index={index}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size={size} is outside {MIN_SIZE}..{MAX_SIZE} pixels")
    for_world, for_words, for_noise = np.random.SeedSequence((seed, index)).spawn(3)
    world = draw_world(np.random.Generator(np.random.PCG64(for_world)))
    rotation = world.rotation
    columns, rows = _centres(size)
    hits = trace(world, pixel_rays(rotation, columns, rows))
    depth = hits.distance.reshape(size, size)
    normals = np.ascontiguousarray(hits.normals.T @ rotation.astype(np.float32)).reshape(size, size, 3)
    instances = (np.maximum(hits.surface, FIRST_BODY - 1) - np.uint8(FIRST_BODY - 1)).reshape(size, size)
    colours, code = shade(world, hits)
    _smooth_edges(world, rotation, colours, code, size)
    objects = _objects(world, instances)
    floor, wall = (world.floor.colour, world.floor.texture), (world.wall.colour, world.wall.texture)
    return Scene(
        image=_expose(colours, np.random.Generator(np.random.PCG64(for_noise)), size),
        depth=depth,
        normals=normals,
        semantic=_class_table(world)[hits.surface].reshape(size, size),
        instances=instances,
        objects=objects,
        caption=describe(np.random.Generator(np.random.PCG64(for_words)), objects, floor, wall),
        summary=summary(objects, floor[0], wall[0]),
        camera=_camera(world, size),
        floor=floor,
        wall=wall,
    )


def _camera(world: World, size: int) -> Camera:
    return Camera(FOCAL * size, CAMERA_HEIGHT, float(np.degrees(world.pitch)), float(np.degrees(world.yaw)))


def _centres(size: int) -> tuple[Array, Array]:
    line = (np.arange(size) + 0.5) / size
    return np.tile(line, size), np.repeat(line, size)


def _class_table(world: World) -> NDArray[np.uint8]:
    kinds = ["floor", "wall", "wall", "wall", "wall", *(body.solid.kind for body in world.bodies)]
    return np.array([CLASSES.index(kind) for kind in kinds], dtype=np.uint8)


def _smooth_edges(world: World, rotation: Array, colours: Array, code: NDArray[np.uint8], size: int) -> None:
    """Replace the pixels on either side of an edge by the mean of four rays each; the rest is smooth already."""
    grid = code.reshape(size, size)
    edge = np.zeros((size, size), dtype=bool)
    down, across = grid[1:] != grid[:-1], grid[:, 1:] != grid[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    chosen = np.flatnonzero(edge)
    if not chosen.size:
        return
    row, column = np.divmod(chosen, size)
    # A rotated grid of four: no two subsamples share a row or a column.
    offsets = np.array([(0.125, 0.625), (0.375, 0.125), (0.625, 0.875), (0.875, 0.375)])
    columns = (column + offsets[:, :1]) / size
    rows = (row + offsets[:, 1:]) / size
    sub, _ = shade(world, trace(world, pixel_rays(rotation, columns.ravel(), rows.ravel())))
    colours[:, chosen] = np.minimum(sub, 1).reshape(3, 4, -1).mean(axis=1)


def _expose(colours: Array, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Display gamma, sensor noise (2 to 5 of 255, per picture) and rounding."""
    level = rng.uniform(2.0, 5.0)
    picture = np.sqrt(np.clip(colours, 0, 1)) * np.float32(255)
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(level)
    picture = np.clip(picture, 0, 255) + np.float32(0.5)
    return np.ascontiguousarray(picture.astype(np.uint8).T).reshape(size, size, 3)


def _objects(world: World, instances: NDArray[np.uint8]) -> tuple[SceneObject, ...]:
    found = []
    for number, body in enumerate(world.bodies, 1):
        mask = instances == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not rows.size:  # cannot happen from 16 pixels up, where 1.3 % is three pixels
            continue
        centre = (body.solid.centre - world.eye) @ world.rotation
        found.append(
            SceneObject(
                instance=number,
                class_name=body.solid.kind,
                colour=body.surface.colour,
                texture=body.surface.texture,
                material="shiny" if body.surface.gloss else "matte",
                size=body.size,
                box=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
                area=int(np.count_nonzero(mask)),
                centre=(float(centre[0]), float(centre[1]), float(centre[2])),
                middle=float(centre[0] / centre[2] * FOCAL + 0.5),
            )
        )
    return tuple(found)
