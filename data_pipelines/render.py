"""Views of objects without a graphics library: surfaces become coloured points, and points are splatted by depth.

Shape legend
    N     points on a surface
    3     x (right), y (up), z (towards the viewer at azimuth 0), in a sphere of radius 1; or red, green, blue in [0, 1]
    R     side of the picture that is drawn, SUPERSAMPLE times the wanted one
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image

from flagdit.errors import DataError

POINTS = 60_000
SUPERSAMPLE = 2
DISTANCE, FOCAL = 3.2, 2.9
ELEVATION = 20.0
AMBIENT = 0.45
PLAIN = (0.75, 0.75, 0.75)


@dataclass(frozen=True)
class Surface:
    """Points spread evenly over an object, with their outward normals and colours."""

    points_N3: np.ndarray
    normals_N3: np.ndarray
    colours_N3: np.ndarray


def views(surface: Surface, azimuths: list[float], side: int, elevation: float = ELEVATION) -> list[Image.Image]:
    """Pictures of an object on white from around it, at azimuths in degrees."""
    return [_view(surface, math.radians(a), math.radians(elevation), side) for a in azimuths]


def _view(surface: Surface, azimuth: float, elevation: float, side: int) -> Image.Image:
    r = side * SUPERSAMPLE
    sin_a, cos_a, sin_e, cos_e = math.sin(azimuth), math.cos(azimuth), math.sin(elevation), math.cos(elevation)
    forward = -np.array([sin_a * cos_e, sin_e, cos_a * cos_e])
    right = np.array([cos_a, 0.0, -sin_a])
    up = np.cross(right, forward)
    depth = surface.points_N3 @ forward + DISTANCE
    column = (r / 2 * (1 + FOCAL * (surface.points_N3 @ right) / depth)).astype(int)
    row = (r / 2 * (1 - FOCAL * (surface.points_N3 @ up) / depth)).astype(int)
    light = -0.6 * forward + 0.6 * up + 0.3 * right
    # Meshes from the field have faces turned inside out, so both sides are lit.
    shade = AMBIENT + (1 - AMBIENT) * np.abs(surface.normals_N3 @ (light / np.linalg.norm(light)))
    colour = surface.colours_N3 * shade[:, None]
    seen = (column >= 0) & (column < r - 1) & (row >= 0) & (row < r - 1)
    place = row[seen] * r + column[seen]
    # Each point covers 2×2 pixels, so that no gaps show; the nearest is written last.
    places = np.concatenate([place, place + 1, place + r, place + r + 1])
    order = np.argsort(-np.tile(depth[seen], 4), kind="stable")
    sheet = np.ones((r * r, 3))
    sheet[places[order]] = np.tile(colour[seen], (4, 1))[order]
    small = sheet.reshape(side, SUPERSAMPLE, side, SUPERSAMPLE, 3).mean(axis=(1, 3))
    return Image.fromarray((small.clip(0, 1) * 255).round().astype(np.uint8))


PRIMITIVES = ("cube", "ball", "can", "card", "pyramid")


def primitive(shape: str, texture: Image.Image, side: int) -> Surface:
    """A simple solid with a picture on its sides, with enough points for views of so many pixels."""
    u, v, face = _spread(min(POINTS, 4000 + 14 * side * side))
    s, t = 2 * u - 1, 2 * v - 1
    one, zero = np.ones_like(u), np.zeros_like(u)
    if shape == "ball":
        angle, height = u * 2 * math.pi, t
        ring = np.sqrt(1 - height**2)
        p = np.stack([ring * np.sin(angle), height, ring * np.cos(angle)], 1)
        # The picture stands twice around the ball, upright.
        return Surface(p, p, _paint(texture, (u * 2) % 1, np.arccos(-height) / math.pi))
    if shape == "can":
        angle = u * 2 * math.pi
        lid = (face >= 4)[:, None]
        wall = np.stack([0.7 * np.sin(angle), 0.75 * t, 0.7 * np.cos(angle)], 1)
        radius = 0.7 * np.sqrt(v)
        top = np.stack([radius * np.sin(angle), np.where(face == 4, 0.75, -0.75), radius * np.cos(angle)], 1)
        around = np.stack([np.sin(angle), zero, np.cos(angle)], 1)
        normals = np.where(lid, np.stack([zero, one, zero], 1), around)
        colours = np.where(lid, np.array(PLAIN), _paint(texture, (u * 2) % 1, v))
        return Surface(np.where(lid, top, wall), normals, colours)
    if shape == "card":
        p = np.stack([np.where(face % 2, s, -s) * 0.8, t * 0.8, np.where(face % 2, 0.06, -0.06)], 1)
        return Surface(p, np.stack([zero, zero, one], 1), _paint(texture, u, v))
    turn = face % 4
    if shape == "pyramid":
        width = 0.85 * (1 - v)
        p = _turned(np.stack([s * width, 1.5 * v - 0.7, width], 1), turn)
        n = _turned(np.stack([zero, 0.5 * one, 0.85 * one], 1), turn)
        return Surface(p, n, _paint(texture, (s * (1 - v) + 1) / 2, v))
    assert shape == "cube", f"no primitive {shape}"
    flat = (face >= 4)[:, None]
    ends = np.stack([s, np.where(face == 4, 1.0, -1.0), t], 1)
    p = np.where(flat, ends, _turned(np.stack([s, t, one], 1), turn)) * 0.58
    n = np.where(flat, np.stack([zero, one, zero], 1), _turned(np.stack([zero, zero, one], 1), turn))
    return Surface(p, n, _paint(texture, u, v))


def _spread(points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places (u, v) in [0, 1]², and one of six faces, spread evenly by an additive recurrence (Roberts 2018)."""
    i = np.arange(points)
    return (0.5 + i * 0.7548776662466927) % 1, (0.5 + i * 0.5698402909980532) % 1, i % 6


def _turned(p_N3: np.ndarray, quarter: np.ndarray) -> np.ndarray:
    """Points turned about the y axis by quarters of a circle."""
    sin, cos = np.array([0, 1, 0, -1])[quarter], np.array([1, 0, -1, 0])[quarter]
    x, y, z = p_N3.T
    return np.stack([cos * x + sin * z, y, cos * z - sin * x], 1)


def _paint(texture: Image.Image, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    pixels = np.asarray(texture.convert("RGB")) / 255
    rows, columns = pixels.shape[:2]
    return pixels[((1 - v) * (rows - 1)).round().astype(int), (u * (columns - 1)).round().astype(int)]


def surface_of_mesh(data: bytes, ending: str, resolve: Callable[[str], bytes] | None = None) -> Surface:
    """Points on a mesh file, moved and scaled into the unit sphere.

    Args:
        data: content of the file.
        ending: obj, glb, stl, ply or off.
        resolve: name of a file that the mesh refers to → its content; raises KeyError where there is none.

    Raises:
        DataError: not a mesh, or one without faces.
    """
    import io

    import trimesh

    try:
        scene = trimesh.load_scene(
            io.BytesIO(data),
            file_type=ending,
            process=False,
            resolver=cast(Any, _Resolver(resolve)),
            allow_remote=False,
        )
        parts = [g for g in scene.dump() if isinstance(g, trimesh.Trimesh) and len(g.faces) and g.area > 0]
    except Exception as error:  # parsers of hostile files raise anything; it becomes the reason in the ledger
        raise DataError(f"cannot be read as a mesh ({type(error).__name__}: {error})") from error
    if not parts:
        raise DataError("has no faces")
    total = sum(part.area for part in parts)
    pieces = [_sample_mesh(part, max(64, int(POINTS * part.area / total)), i) for i, part in enumerate(parts)]
    points, normals, colours = (np.concatenate(x) for x in zip(*pieces, strict=True))
    if not np.isfinite(points).all():
        raise DataError("holds points that are not finite")
    low, high = points.min(0), points.max(0)
    scale = np.linalg.norm(high - low) / 2
    if not scale > 0:
        raise DataError("is a single point")
    return Surface((points - (low + high) / 2) / scale, normals, colours)


class _Resolver:
    """What trimesh asks for materials and textures; it never touches the file system itself."""

    def __init__(self, resolve: Callable[[str], bytes] | None):
        self._resolve = resolve

    def get(self, name: str) -> bytes:
        if self._resolve is None:
            raise KeyError(name)
        return self._resolve(name.strip())

    __getitem__ = get

    def namespaced(self, namespace: str) -> _Resolver:
        return self

    def keys(self) -> list[str]:
        return []


def _sample_mesh(part: Any, count: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    areas = part.area_faces
    faces = rng.choice(len(areas), count, p=areas / areas.sum())
    u = rng.random((count, 2))
    u[u.sum(1) > 1] = 1 - u[u.sum(1) > 1]
    weights = np.stack([1 - u.sum(1), u[:, 0], u[:, 1]], 1)
    points = (part.triangles[faces] * weights[..., None]).sum(1)
    return points, part.face_normals[faces], _mesh_colours(part, faces, weights)


def _mesh_colours(part: Any, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    material, uv = getattr(part.visual, "material", None), getattr(part.visual, "uv", None)
    image = getattr(material, "image", None) or getattr(material, "baseColorTexture", None)
    if image is not None and uv is not None:
        at = (uv[part.faces[faces]] * weights[..., None]).sum(1) % 1
        return _paint(image, at[:, 0], at[:, 1])
    if part.visual.kind in ("face", "vertex"):
        return part.visual.face_colors[faces, :3] / 255
    main = getattr(material, "main_color", None)
    colour = np.asarray(main[:3]) / 255 if main is not None else np.array(PLAIN)
    return np.broadcast_to(colour, (len(faces), 3))
