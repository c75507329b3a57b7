"""From rays to colours: which surface a ray meets, its pattern, light, hard shadow and highlight.

Surfaces are numbered 0 floor, 1..4 walls, 5.. bodies. Arrays hold one column per ray. Invariant: what `trace` reports
(distance, surface, normal) is exact at the ray; only colours are approximations of anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fourmill.scenes.rays import Array, cull, dot, hit, normals_at
from fourmill.scenes.world import CAMERA_HEIGHT, Body, Surface, World

FIRST_BODY = 5
# Columns: normals of the floor and of the back, right, left and rear walls.
_INWARD = np.array([[0, 0, -1, 1, 0], [-1, 0, 0, 0, 0], [0, -1, 0, 0, 1]], dtype=np.float32)


@dataclass(frozen=True)
class Hits:
    """What N rays met: distance (N,) float32 in ray lengths, surface (N,) uint8, normals and points (3, N), world."""

    distance: Array
    surface: NDArray[np.uint8]
    normals: Array
    points: Array


def trace(world: World, rays: Array) -> Hits:
    """Nearest surface along each (3, N) ray from the eye. The room is closed, so every ray meets one."""
    eye, rays = world.eye, rays.astype(np.float32)
    distance, surface = _trace_room(world, rays)
    on_body = []
    for number, body in enumerate(world.bodies, FIRST_BODY):
        near = cull(body.solid, eye, rays)
        reach = hit(body.solid, eye, rays[:, near])
        closer = reach < distance[near]
        distance[near[closer]] = reach[closer]
        surface[near[closer]] = number
        on_body.append(near)
    points = rays * distance
    points += eye.astype(np.float32)[:, None]
    normals = _INWARD.take(np.minimum(surface, FIRST_BODY - 1), axis=1)
    for number, (body, near) in enumerate(zip(world.bodies, on_body, strict=True), FIRST_BODY):
        mine = near[surface[near] == number]
        exact = eye[:, None] + rays[:, mine].astype(np.float64) * distance[mine]
        normals[:, mine] = normals_at(body.solid, exact)
    return Hits(distance, surface, normals, points)


def _trace_room(world: World, rays: Array) -> tuple[Array, NDArray[np.uint8]]:
    """Distance (N,) float32 and surface (N,) of the floor and the walls; only what a ray heads for can be met."""
    back, right, left, behind = (np.float32(place) for place in world.walls)
    with np.errstate(divide="ignore", invalid="ignore"):
        aside = np.where(rays[0] > 0, right, left) / rays[0]
        ahead = np.where(rays[2] > 0, back, behind) / rays[2]
        down = np.float32(CAMERA_HEIGHT) / rays[1]
    down[~(rays[1] > 0)] = np.inf
    surface = np.where(rays[2] > 0, np.uint8(1), np.uint8(4))
    sideways = aside < ahead
    surface[sideways] = np.where(rays[0][sideways] > 0, np.uint8(2), np.uint8(3))
    distance = np.minimum(aside, ahead)
    surface[down < distance] = 0
    return np.minimum(distance, down), surface


def shade(world: World, hits: Hits) -> tuple[Array, NDArray[np.uint8]]:
    """Colours (3, N) float32, about 0..1, and a code (N,) that changes wherever the picture has an edge."""
    albedo, gloss, pattern = _paint(world, hits)
    points, normals = hits.points, hits.normals
    to_light = np.array(world.light, dtype=np.float32)[:, None] - points
    distance2 = dot(to_light, to_light)
    length = np.sqrt(distance2)
    to_light /= length
    facing = np.maximum(dot(normals, to_light), 0)
    shadow = _shadowed(world, hits, to_light, facing, length)
    facing[shadow] = 0
    # Softened inverse square: full strength at 3 m, about a half at 6 m, so that far walls do not go black.
    diffuse = facing * ((1.15 - world.ambient) * 2 / (1 + distance2 / 9))
    colour = albedo * (diffuse + world.ambient * (0.85 - 0.15 * normals[1]))  # upper sides a little brighter
    shiny = np.flatnonzero((gloss > 0) & (facing > 0))
    if shiny.size:
        shine = _highlight(world, points[:, shiny], normals[:, shiny], to_light[:, shiny])
        colour[:, shiny] += shine * gloss[shiny]
    code = hits.surface * np.uint8(4) + pattern * np.uint8(2) + shadow
    return colour, code


def _shadowed(world: World, hits: Hits, to_light: Array, facing: Array, length: Array) -> NDArray[np.bool_]:
    """Whether a body stands between the light and the point. Convex bodies never shadow their own lit side."""
    light, beams = np.array(world.light), -to_light
    shadow = np.zeros(facing.size, dtype=bool)
    for number, body in enumerate(world.bodies, FIRST_BODY):
        near = cull(body.solid, light, beams)
        near = near[(hits.surface[near] != number) & (facing[near] > 0)]
        reach = hit(body.solid, light, beams[:, near])
        shadow[near[reach < 0.999 * length[near]]] = True
    return shadow


def _highlight(world: World, points: Array, normals: Array, to_light: Array) -> Array:
    to_eye = world.eye.astype(np.float32)[:, None] - points
    to_eye /= np.sqrt(dot(to_eye, to_eye))
    halfway = to_light + to_eye
    halfway /= np.sqrt(dot(halfway, halfway))
    return np.maximum(dot(normals, halfway), 0) ** 40


def _paint(world: World, hits: Hits) -> tuple[Array, Array, NDArray[np.uint8]]:
    """Albedo (3, N) float32, gloss (N,) float32 and pattern bit (N,) uint8."""
    surfaces = [world.floor, *[world.wall] * 4, *(body.surface for body in world.bodies)]
    pattern = np.zeros(hits.surface.size, dtype=np.uint8)
    for number, surface in enumerate(surfaces):
        if surface.texture == "plain":
            continue
        mine = np.flatnonzero(hits.surface == number)
        if mine.size:
            across, up = _chart(world, number, hits.points[:, mine], hits.normals[:, mine])
            pattern[mine] = _pattern(surface, across, up)
    both = np.array([(surface.first, surface.second) for surface in surfaces], dtype=np.float32)
    gloss = np.array([surface.gloss for surface in surfaces], dtype=np.float32)
    albedo = np.ascontiguousarray(both.reshape(-1, 3).T).take(hits.surface * 2 + pattern, axis=1)
    return albedo, gloss[hits.surface], pattern


def _chart(world: World, number: int, points: Array, normals: Array) -> tuple[Array, Array]:
    """Two coordinates in metres that unroll a surface: along it, and up it."""
    if number == 0:
        return points[0], points[2]
    if number < FIRST_BODY:
        return (points[0] if number in (1, 4) else points[2]), points[1]
    return _chart_body(world.bodies[number - FIRST_BODY], points, normals)


def _chart_body(body: Body, points: Array, normals: Array) -> tuple[Array, Array]:
    solid = body.solid
    local = solid.to_local(points - solid.centre[:, None])
    if solid.kind == "box":
        face = np.abs(solid.to_local(normals)).argmax(axis=0)
        return np.where(face == 0, local[2], local[0]), np.where(face == 1, local[2], local[1])
    # A whole number of periods around the body, so that the pattern closes.
    periods = max(round(np.pi * solid.radius / body.surface.scale), 2)
    around = np.arctan2(local[2], local[0]) * (periods * body.surface.scale / np.pi)
    if solid.kind == "cylinder":
        lid = normals[1] < -0.5
        return np.where(lid, local[0], around), np.where(lid, local[2], local[1])
    return around, local[1]


def _pattern(surface: Surface, across: Array, up: Array) -> NDArray[np.uint8]:
    u, v = across / surface.scale, up / surface.scale
    if surface.texture == "striped":
        bits = np.floor(u if surface.upright else v).astype(np.int64) & 1
        return bits.astype(np.uint8)
    if surface.texture == "checkered":
        return ((np.floor(u) + np.floor(v)).astype(np.int64) & 1).astype(np.uint8)
    du, dv = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    return (du * du + dv * dv < 0.1).astype(np.uint8)
