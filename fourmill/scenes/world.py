"""What stands in a room: the description of a scene, drawn from (seed, index) and independent of the picture's size.

Invariants: the same (seed, index) always gives the same world; bodies do not intersect each other or the walls; every
body covers at least `MIN_AREA` of the picture and shows most of its outline. Camera height and field of view are fixed,
so metric depth can be read from a single picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fourmill.scenes.rays import Array, Solid, cull, hit

CLASSES = ("floor", "wall", "sphere", "box", "cylinder", "cone")
SHAPES = CLASSES[2:]
CAMERA_HEIGHT = 1.5  # metres above the floor
FIELD_OF_VIEW = 60.0  # degrees, edge to edge, both ways (pictures are square)
FOCAL = 0.5 / np.tan(np.radians(FIELD_OF_VIEW / 2))  # focal length in picture widths: 0.866
MIN_AREA = 0.013  # of the picture; above the 1 % that a caption mentions, as the probe is coarse
PROBE = 48  # pixels a side of the coarse picture in which placements are tried

RGB = {
    "red": (0.80, 0.10, 0.09),
    "green": (0.13, 0.58, 0.16),
    "blue": (0.10, 0.22, 0.80),
    "yellow": (0.92, 0.80, 0.10),
    "purple": (0.50, 0.14, 0.64),
    "orange": (0.95, 0.46, 0.05),
    "cyan": (0.10, 0.72, 0.76),
    "white": (0.92, 0.92, 0.90),
    "black": (0.08, 0.08, 0.09),
    "pink": (0.94, 0.50, 0.65),
}
ROOM_RGB = {
    "gray": (0.52, 0.52, 0.52),
    "white": (0.84, 0.83, 0.80),
    "brown": (0.46, 0.31, 0.20),
    "beige": (0.76, 0.67, 0.50),
    "green": (0.46, 0.60, 0.44),
    "blue": (0.46, 0.56, 0.72),
    "pink": (0.76, 0.55, 0.57),
    "yellow": (0.82, 0.75, 0.42),
}
TEXTURES = ("plain", "striped", "checkered", "dotted")


@dataclass(frozen=True)
class Surface:
    """How a surface looks: colour and pattern word, the pattern's two RGB values (0..1), its scale and gloss.

    `upright` stripes run up a wall or away from the eye; the others run around a body.
    """

    colour: str
    texture: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    scale: float  # metres per half period
    gloss: float = 0.0
    upright: bool = False


@dataclass(frozen=True)
class Body:
    """A solid with its look and its size word."""

    solid: Solid
    surface: Surface
    size: str


@dataclass(frozen=True)
class World:
    """A room, its light and its bodies. Distances in metres, angles in radians; the eye stands over (0, 0)."""

    pitch: float
    yaw: float
    walls: tuple[float, float, float, float]  # z of the back wall, x of the right and the left, z behind
    light: tuple[float, float, float]
    ambient: float
    floor: Surface
    wall: Surface
    bodies: tuple[Body, ...]

    @property
    def eye(self) -> Array:
        """(3,) camera position, world frame."""
        return np.array([0.0, -CAMERA_HEIGHT, 0.0])

    @property
    def rotation(self) -> Array:
        """(3, 3) camera-to-world rotation: columns are the camera's right, down and forward axes."""
        cp, sp, cy, sy = np.cos(self.pitch), np.sin(self.pitch), np.cos(self.yaw), np.sin(self.yaw)
        pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])  # a positive pitch looks down: forward gains +y
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        return yaw @ pitch


def pixel_rays(rotation: Array, columns: Array, rows: Array) -> Array:
    """World directions (3, N) through image positions in 0..1; one unit along them is one metre of z-depth."""
    camera = np.stack([(columns - 0.5) / FOCAL, (rows - 0.5) / FOCAL, np.ones_like(columns)])
    return rotation @ camera


def draw_world(rng: np.random.Generator) -> World:
    """Draw a room and one to four bodies that can be told apart."""
    back, right, left, behind = rng.uniform((4.2, 2.2, -4.5, -3.0), (7.5, 4.5, -2.2, -2.0))
    pitch, yaw = np.radians(rng.uniform((13.0, -28.0), (24.0, 28.0)))
    light_at = rng.uniform((left * 0.6, -4.2, -0.8), (right * 0.6, -3.0, 2.2))
    empty = World(
        pitch=float(pitch),
        yaw=float(yaw),
        walls=(float(back), float(right), float(left), float(behind)),
        light=(float(light_at[0]), float(light_at[1]), float(light_at[2])),
        ambient=float(rng.uniform(0.36, 0.5)),
        floor=_room_surface(rng, {"plain": 0.5, "checkered": 0.3, "striped": 0.2}, 0.35),
        wall=_room_surface(rng, {"plain": 0.7, "striped": 0.3}, 0.3),
        bodies=(),
    )
    wanted = int(rng.choice(4, p=(0.2, 0.3, 0.3, 0.2))) + 1
    return replace(empty, bodies=tuple(_place(rng, empty, wanted)))


def _place(rng: np.random.Generator, world: World, wanted: int) -> list[Body]:
    centres = (np.arange(PROBE) + 0.5) / PROBE
    columns, rows = (grid.ravel() for grid in np.meshgrid(centres, centres))
    rays = pixel_rays(world.rotation, columns, rows)
    bodies: list[Body] = []
    outlines: list[Array] = []  # distances of each body alone
    for _ in range(60):
        if len(bodies) == wanted:
            break
        looks_of = bodies[-1] if bodies and rng.random() < 0.25 else None
        body = _draw_body(rng, world, looks_of)
        if body is None or not _stands_free(body.solid, world, bodies):
            continue
        distances = np.full(PROBE * PROBE, np.inf)
        seen = cull(body.solid, world.eye, rays)
        distances[seen] = hit(body.solid, world.eye, rays[:, seen])
        if _all_visible([*outlines, distances]):
            bodies.append(body)
            outlines.append(distances)
    return bodies


def _draw_body(rng: np.random.Generator, world: World, like: Body | None) -> Body | None:
    """A body whose foot projects to a random picture position; None where that ray misses the floor near the eye."""
    column, row = rng.uniform((0.1, 0.3), (0.9, 0.92))
    ray = pixel_rays(world.rotation, np.array([column]), np.array([row]))[:, 0]
    if ray[1] <= 0.05:
        return None
    foot = ray * (CAMERA_HEIGHT / ray[1])
    if not 1.7 <= float(np.hypot(foot[0], foot[2])) <= 6.0:
        return None
    kind = _pick(rng, SHAPES) if like is None else like.solid.kind
    size = _pick(rng, ("small", "large"))
    scale = float(rng.uniform(0.29, 0.36) if size == "small" else rng.uniform(0.5, 0.6))
    solid = _shape(kind, float(foot[0]), float(foot[2]), scale, rng.uniform(0.0, 1.0, 3))
    return Body(solid, _body_surface(rng, scale) if like is None else like.surface, size)


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _shape(kind: str, x: float, z: float, scale: float, proportions: NDArray[np.float64]) -> Solid:
    wide, tall, turn = (float(value) for value in proportions)
    if kind == "sphere":
        return Solid(kind, x, z, scale, 2 * scale, 2 * np.pi * turn)
    if kind == "box":
        half = scale * (0.75 + 0.2 * wide)
        return Solid(kind, x, z, half, scale * (1.4 + 0.6 * tall), np.pi / 2 * turn, half)
    if kind == "cylinder":
        return Solid(kind, x, z, scale * (0.7 + 0.15 * wide), scale * (1.6 + 0.5 * tall), 2 * np.pi * turn)
    return Solid(kind, x, z, scale * (0.9 + 0.15 * wide), scale * (2.0 + 0.3 * tall), 2 * np.pi * turn)


def _stands_free(solid: Solid, world: World, bodies: list[Body]) -> bool:
    back, right, left, behind = world.walls
    room = solid.footprint + 0.05
    if not (left + room < solid.x < right - room and behind + room < solid.z < back - room):
        return False
    for other in bodies:
        gap = np.hypot(solid.x - other.solid.x, solid.z - other.solid.z)
        if gap < solid.footprint + other.solid.footprint + 0.1:
            return False
    return True


def _all_visible(outlines: list[Array]) -> bool:
    """Whether each body keeps enough area and 55 % of its outline, and none is cut by the border while small."""
    stack = np.stack(outlines)
    nearest = stack.argmin(axis=0)
    for number, outline in enumerate(stack):
        inside = np.isfinite(outline)
        visible = np.count_nonzero(inside & (nearest == number))
        if visible < max(MIN_AREA * outline.size, 0.55 * np.count_nonzero(inside)):
            return False
        grid = inside.reshape(PROBE, PROBE)
        cut = grid[0].any() or grid[-1].any() or grid[:, 0].any() or grid[:, -1].any()
        if cut and visible < 4 * MIN_AREA * outline.size:
            return False
    return True


def _body_surface(rng: np.random.Generator, scale: float) -> Surface:
    colour = _pick(rng, tuple(RGB))
    texture = str(rng.choice(TEXTURES, p=(0.55, 0.15, 0.15, 0.15)))
    first = np.clip(np.array(RGB[colour]) * rng.uniform(0.88, 1.1) * rng.uniform(0.95, 1.05, 3), 0.02, 0.97)
    # The second colour keeps the name of the first: lighter patterns on dark paint, darker ones on light paint.
    second = first * 0.35 if colour not in ("black", "blue", "purple") else 0.5 + 0.5 * first
    gloss = float(rng.choice((0.0, 0.55)))
    return Surface(colour, texture, _rgb(first), _rgb(second), scale * 0.42, gloss)


def _room_surface(rng: np.random.Generator, textures: dict[str, float], scale: float) -> Surface:
    colour = _pick(rng, tuple(ROOM_RGB))
    texture = str(rng.choice(list(textures), p=list(textures.values())))
    first = np.clip(np.array(ROOM_RGB[colour]) + rng.uniform(-0.04, 0.04, 3), 0.05, 0.95)
    return Surface(colour, texture, _rgb(first), _rgb(first * rng.uniform(0.68, 0.8)), scale, upright=True)


def _rgb(values: Array) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])
