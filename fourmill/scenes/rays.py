"""Exact intersections of many rays with a few solids and the planes of a room.

Every ray of one call starts at the same point (the eye, or the light for shadows), so half of each quadratic is a
scalar. Distances are multiples of the given direction, not metres: with directions whose z is 1 in the camera frame a
distance *is* the z-depth. World frame: x right, y down, z forward, the floor at y = 0, so heights are negative.
Invariant: a hit is the nearest one in front of the origin, computed in float64 for solids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# Rays closer than this to their origin do not count as hits: nothing is ever placed within 10 cm of eye or light.
_NEAR = 1e-3


@dataclass(frozen=True)
class Solid:
    """One convex body standing on the floor.

    `kind` is a class name; `x`, `z` its foot in metres; `radius` the sphere's, cylinder's or cone's radius, or half the
    box's width; `height` in metres; `turn` its rotation about the vertical in radians; `depth` half the box's depth.
    """

    kind: str
    x: float
    z: float
    radius: float
    height: float
    turn: float = 0.0
    depth: float = 0.0

    @property
    def centre(self) -> Array:
        """(3,) middle of the body, world frame, metres."""
        return np.array([self.x, -self.height / 2, self.z])

    @property
    def bound(self) -> float:
        """Radius in metres of a ball around `centre` that contains the body."""
        if self.kind == "sphere":
            return self.radius
        across = np.hypot(self.radius, self.depth) if self.kind == "box" else self.radius
        return float(np.hypot(across, self.height / 2))

    @property
    def footprint(self) -> float:
        """Radius in metres of the circle on the floor that the body needs for itself."""
        return float(np.hypot(self.radius, self.depth)) if self.kind == "box" else self.radius

    def to_local(self, vectors: Array) -> Array:
        """Rotate (3, N) world vectors into the body's own axes."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        x, y, z = vectors
        return np.stack([cos * x - sin * z, y, sin * x + cos * z])

    def to_world(self, vectors: Array) -> Array:
        """Inverse of `to_local`."""
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        x, y, z = vectors
        return np.stack([cos * x + sin * z, y, cos * z - sin * x])


def dot(one: Array, other: Array) -> Array:
    """Inner products (N,) of the columns of two (3, N) arrays; thrice as fast as einsum here."""
    return one[0] * other[0] + one[1] * other[1] + one[2] * other[2]


def cull(solid: Solid, origin: Array, directions: Array) -> NDArray[np.intp]:
    """Indices of the (3, N) directions that pass through the body's bounding ball."""
    axis = solid.centre - origin
    distance2 = float(axis @ axis)
    along = axis.astype(directions.dtype) @ directions
    length2 = dot(directions, directions)
    # cos(angle) >= sqrt(1 - (r/d)^2), squared; 1.001 covers float32 rounding.
    inside = max(distance2 - (1.001 * solid.bound) ** 2, 0.0)
    return np.flatnonzero((along > 0) & (along * along >= inside * length2))


def hit(solid: Solid, origin: Array, directions: Array) -> Array:
    """Distance along each (3, N) direction to the body, float64, infinity where it is missed."""
    start = solid.to_local((origin - solid.centre)[:, None])[:, 0]
    rays = solid.to_local(directions.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return _HITS[solid.kind](solid, start, rays)


def normals_at(solid: Solid, points: Array) -> Array:
    """Outward unit normals (3, N), world frame, at (3, N) world points on the body."""
    local = solid.to_local(points - solid.centre[:, None])
    return solid.to_world(_NORMALS[solid.kind](solid, local))


def _nearest(*candidates: Array) -> Array:
    best = np.full_like(candidates[0], np.inf)
    for candidate in candidates:
        # A NaN (no root) compares false: a miss.
        np.minimum(best, np.where(candidate > _NEAR, candidate, np.inf), out=best)
    return best


def _roots(a: Array, half_b: Array, c: float) -> tuple[Array, Array]:
    root = np.sqrt(half_b * half_b - a * c)
    return (-half_b - root) / a, (-half_b + root) / a


def _hit_sphere(solid: Solid, start: Array, rays: Array) -> Array:
    a = dot(rays, rays)
    return _nearest(_roots(a, start @ rays, float(start @ start) - solid.radius**2)[0])


def _hit_box(solid: Solid, start: Array, rays: Array) -> Array:
    half = np.array([solid.radius, solid.height / 2, solid.depth])[:, None]
    first, second = (-half - start[:, None]) / rays, (half - start[:, None]) / rays
    enter = np.minimum(first, second).max(axis=0)
    leave = np.maximum(first, second).min(axis=0)
    return _nearest(np.where(enter <= leave, enter, np.inf))


def _hit_cylinder(solid: Solid, start: Array, rays: Array) -> Array:
    half = solid.height / 2
    a = rays[0] ** 2 + rays[2] ** 2
    half_b = start[0] * rays[0] + start[2] * rays[2]
    near, _ = _roots(a, half_b, start[0] ** 2 + start[2] ** 2 - solid.radius**2)
    side = np.where(np.abs(start[1] + near * rays[1]) <= half, near, np.inf)
    lid = (-half - start[1]) / rays[1]
    across2 = (start[0] + lid * rays[0]) ** 2 + (start[2] + lid * rays[2]) ** 2
    return _nearest(side, np.where(across2 <= solid.radius**2, lid, np.inf))


def _hit_cone(solid: Solid, start: Array, rays: Array) -> Array:
    slope = solid.radius / solid.height
    apex = start[1] + solid.height / 2  # metres below the apex, along y
    a = rays[0] ** 2 + rays[2] ** 2 - (slope * rays[1]) ** 2
    half_b = start[0] * rays[0] + start[2] * rays[2] - slope**2 * apex * rays[1]
    c = start[0] ** 2 + start[2] ** 2 - (slope * apex) ** 2
    valid = []
    for root in _roots(a, half_b, c):  # the mirror cone above the apex is no part of the body
        below = apex + root * rays[1]
        valid.append(np.where((below >= 0) & (below <= solid.height), root, np.inf))
    return _nearest(*valid)


def _normal_sphere(solid: Solid, local: Array) -> Array:
    return local / np.linalg.norm(local, axis=0)


def _normal_box(solid: Solid, local: Array) -> Array:
    half = np.array([solid.radius, solid.height / 2, solid.depth])[:, None]
    face = np.abs(local / half).argmax(axis=0)
    normal = np.zeros_like(local)
    columns = np.arange(local.shape[1])
    normal[face, columns] = np.sign(local[face, columns])
    return normal


def _normal_cylinder(solid: Solid, local: Array) -> Array:
    radial = np.hypot(local[0], local[2])
    # The nearer surface decides: the lid, or the side.
    lid = solid.radius - radial > local[1] + solid.height / 2
    outward = np.stack([local[0] / radial, np.zeros_like(radial), local[2] / radial])
    return np.where(lid, np.array([0.0, -1.0, 0.0])[:, None], outward)


def _normal_cone(solid: Solid, local: Array) -> Array:
    radial = np.maximum(np.hypot(local[0], local[2]), 1e-9)
    length = np.hypot(solid.height, solid.radius)
    out, up = solid.height / length, solid.radius / length
    return np.stack([out * local[0] / radial, np.full_like(radial, -up), out * local[2] / radial])


_HITS = {"sphere": _hit_sphere, "box": _hit_box, "cylinder": _hit_cylinder, "cone": _hit_cone}
_NORMALS = {"sphere": _normal_sphere, "box": _normal_box, "cylinder": _normal_cylinder, "cone": _normal_cone}
