"""Draws a shot's frames: a tunnel with folds, light, fluid, a lesion, a tool. numpy at a quarter of the size, enlarged
by Pillow: a model that looks at 112 pixels does not see the difference, and drawing takes a third of the time.

Lengths are in units of half the picture's height; the origin is its middle, x to the right, y down. Nothing is looked
up from real footage. Colours go through palettes (light 0..255 x vessel 0..15 -> RGB), textures tile.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image

from surgvqa.demo.shots import Shot

WIDTH, HEIGHT = 1240, 1080
SHRINK = 4
DRAWN_W, DRAWN_H = WIDTH // SHRINK, HEIGHT // SHRINK
UNIT = DRAWN_H / 2
"""Pixels of the drawn picture in one unit of length."""
TEXTURE = 512
VESSEL_LEVELS = 16


# --- what all shots share --------------------------------------------------------------------------------------------


@cache
def textures() -> dict[str, np.ndarray]:
    """Tiling [512, 512] float32 fields: `cloud` and `fine` in 0..1, `vessels` 0..1 (1 on a vessel), `grain`, mean 0."""
    rng = np.random.default_rng(7)

    def noise(low: float, high: float) -> np.ndarray:
        """White noise between two spatial frequencies (cycles a tile); band-limited in Fourier space, so it tiles."""
        f = np.hypot(*np.meshgrid(np.fft.fftfreq(TEXTURE, 1 / TEXTURE), np.fft.fftfreq(TEXTURE, 1 / TEXTURE)))
        band = ((f >= low) & (f <= high)) / np.maximum(f, 1)
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((TEXTURE, TEXTURE))) * band).real
        return (field / field.std()).astype(np.float32)

    trunk, branch = noise(2, 7), noise(5, 16)
    vessels = np.exp(-((trunk / 0.09) ** 2)) + 0.6 * np.exp(-((branch / 0.10) ** 2))
    return {
        "cloud": 0.5 + 0.22 * noise(1, 9),
        "fine": 0.5 + 0.22 * noise(20, 90),
        "vessels": np.clip(vessels * (0.35 + 0.5 * (noise(1, 4) > -0.4)), 0, 1),
        "grain": noise(60, 256),
    }


@cache
def plane() -> tuple[np.ndarray, np.ndarray]:
    """Radius and angle / 2 pi on a canvas of twice the picture's size, so that a window of it is any vantage point."""
    y, x = np.mgrid[-DRAWN_H:DRAWN_H, -DRAWN_W:DRAWN_W].astype(np.float32) / UNIT
    return np.hypot(x, y), np.arctan2(y, x) / (2 * np.pi)


@cache
def screen() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y of each pixel of the drawn picture, and the light's fall towards the edge."""
    y, x = np.mgrid[:DRAWN_H, :DRAWN_W].astype(np.float32)
    x, y = (x - DRAWN_W / 2) / UNIT, (y - DRAWN_H / 2) / UNIT
    return x, y, 1 - 0.22 * (x * x + y * y)


@cache
def mask() -> np.ndarray:
    """The endoscope's window, [270, 310, 1] 0..1: a rectangle with its corners cut."""
    y, x = np.mgrid[:DRAWN_H, :DRAWN_W].astype(np.float32)
    x, y = np.abs(x - DRAWN_W / 2), np.abs(y - DRAWN_H / 2)
    inside = np.minimum.reduce(
        [DRAWN_W / 2 - 1.5 - x, DRAWN_H / 2 - 1.5 - y, (DRAWN_W / 2 + DRAWN_H / 2 - 47 - x - y) * 0.707]
    )
    return np.clip(inside / 2, 0, 1)[..., None]


@cache
def grain(number: int) -> np.ndarray:
    """The sensor's noise in a frame, [270, 310, 1] around 0; there are 8 of them."""
    shifted = np.roll(textures()["grain"], (number * 37, number * 91), (0, 1))
    return 3 * np.tile(shifted, (2, 2))[:DRAWN_H, :DRAWN_W, None]


def palette(
    stops: list[tuple[float, tuple[int, int, int]]], vessel: tuple[int, int, int], strength: float
) -> np.ndarray:
    """[256 * 16, 3] uint8: colour by light, drawn towards `vessel` (times the light) by the vessel level."""
    light = np.linspace(0, 1, 256)
    base = np.stack([np.interp(light, [s for s, _ in stops], [c[i] for _, c in stops]) for i in range(3)], -1)
    level = np.linspace(0, strength, VESSEL_LEVELS)[None, :, None]
    tinted = base[:, None] * (1 - level) + (np.array(vessel) * light[:, None] ** 0.8)[:, None] * level
    return np.clip(tinted, 0, 255).astype(np.uint8).reshape(-1, 3)


WALL = {
    "WL": palette(
        [(0, (14, 3, 3)), (0.2, (92, 24, 18)), (0.55, (196, 92, 72)), (0.8, (232, 148, 122)), (1, (255, 222, 204))],
        (176, 34, 34),
        0.75,
    ),
    "NBI": palette(
        [(0, (2, 9, 10)), (0.2, (18, 58, 58)), (0.55, (76, 142, 128)), (0.8, (136, 190, 170)), (1, (216, 240, 224))],
        (58, 44, 36),
        0.9,
    ),
}
LESION = {
    "WL": palette(
        [(0, (40, 4, 8)), (0.4, (150, 34, 36)), (0.8, (226, 92, 84)), (1, (255, 208, 190))], (120, 10, 22), 0.8
    ),
    "NBI": palette(
        [(0, (12, 10, 8)), (0.4, (84, 66, 48)), (0.8, (164, 142, 106)), (1, (240, 232, 206))], (40, 24, 20), 0.9
    ),
}
FLUID = {
    "WL": palette([(0, (52, 36, 8)), (0.5, (150, 116, 40)), (1, (226, 200, 120))], (96, 62, 14), 0.6),
    "NBI": palette([(0, (14, 30, 16)), (0.5, (72, 104, 56)), (1, (176, 200, 140))], (40, 56, 26), 0.6),
}
ROOM = palette(
    [(0, (26, 34, 44)), (0.45, (92, 112, 126)), (0.75, (158, 174, 184)), (1, (250, 252, 255))], (20, 96, 110), 0.9
)
DYE = np.array((30, 62, 168), np.float32)
DRIFT_LENGTH = 1.4
"""How far a lesion drifts over the screen in a shot."""
DRIFT = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "stable": (0, 0)}


def look(colours: np.ndarray, light: np.ndarray, vessel: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 for light 0..1 and vessel 0..1."""
    light_index = np.clip(light * 255, 0, 255).astype(np.int32) * VESSEL_LEVELS
    return colours[light_index + np.clip(vessel * (VESSEL_LEVELS - 1), 0, VESSEL_LEVELS - 1).astype(np.int32)]


# --- a shot ----------------------------------------------------------------------------------------------------------


class Painter:
    """Draws the frames of one shot; what stays the same over the shot is drawn up once."""

    def __init__(self, shot: Shot, seed: int):
        self.shot = shot
        rng = self.rng = np.random.default_rng([seed, *shot.video_id.encode(), shot.place])
        self.wall = WALL[shot.lighting]
        self.offset = rng.integers(0, TEXTURE, 4).tolist()
        # Plain floats throughout: a numpy float64 would turn every float32 array that it meets into float64.
        self.steps = [i / max(shot.length - 1, 1) for i in range(shot.length)]
        self._lay_path()
        if shot.view == "tunnel":
            self._lay_tunnel()
        if shot.tool:
            self.tool_side = float(rng.choice([-1.0, 1.0]))
            self.tool_tip = np.array([self.tool_side * rng.uniform(0.25, 0.45), rng.uniform(0.25, 0.5)])
        self.bubbles = np.stack(
            [rng.uniform(-1.2, 1.2, 70), rng.uniform(-1.1, 1.1, 70), rng.uniform(0.015, 0.11, 70) ** 1.15], -1
        )

    def _lay_path(self) -> None:
        """Where the lumen's end and the lesion stand in each frame, and how far the scope has come."""
        rng, shot = self.rng, self.shot
        self.lumen = [rng.uniform(-0.16, 0.16, 2).tolist()] * shot.length
        if shot.lesion:
            angle = rng.uniform(0, 2 * np.pi)
            self.lesion_radius = rng.uniform(0.30, 0.40)
            beside = 0.42 * np.array([np.cos(angle), np.sin(angle)])
            drift = np.array(DRIFT[shot.lesion])
            start = rng.uniform(-0.15, 0.15, 2) - DRIFT_LENGTH / 2 * drift
            # The scope's tip bends: lesion and lumen pass over the screen together.
            lesion = start + np.outer(self.steps, drift) * DRIFT_LENGTH
            self.lesion, self.lumen = lesion.tolist(), (lesion - beside).tolist()
        travel = {"advancing": 1.0, "withdrawing": -1.0, "still": 0.0}[shot.travel]
        self.depth = [travel * (step - 0.5) * 1.9 for step in self.steps]
        # What lies ahead comes nearer: the opening grows while the scope advances.
        width = rng.uniform(0.47, 0.55)
        self.opening = [width * math.exp(travel * (step - 0.5) * 0.9) for step in self.steps]

    def _lay_tunnel(self) -> None:
        """The wall's shape on the double canvas: distance from the lumen's end, and how its folds bend."""
        rng = self.rng
        radius, turn = plane()
        phase = rng.uniform(0, 2 * np.pi, 3).tolist()
        angle = 2 * np.pi * turn
        shape = 1 + 0.13 * np.cos(3 * angle + phase[0]) + 0.06 * np.cos(2 * angle + phase[1])
        self.reach = 1 / (radius * shape + 0.03)
        self.bend = 0.16 * np.cos(2 * angle + phase[2]) + 0.10 * np.cos(3 * angle + phase[1])
        self.column = ((turn * 2 * TEXTURE).astype(np.int32) + self.offset[0]) % TEXTURE
        self.folds_apart = float(rng.uniform(1.05, 1.35))
        u = np.linspace(0, 1, 1024, dtype=np.float32)
        self.fold = 0.82 + 0.34 * np.exp(-(((u - 0.42) / 0.13) ** 2)) - 0.5 * np.exp(-(((u - 0.66) / 0.09) ** 2))

    def frame(self, i: int) -> Image.Image:
        """The i-th frame, 1240x1080 RGB."""
        views = {"tunnel": self._tunnel, "fluid": self._fluid, "close-up": self._close_up, "outside": self._outside}
        picture = views[self.shot.view](i)
        picture += grain(i % 8)
        picture *= mask()
        drawn = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
        return Image.fromarray(drawn).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)

    def lesion_box(self, i: int) -> tuple[int, int, int, int] | None:
        """Left, right, upper and lower edge of the lesion in the i-th frame, in its pixels; None without one."""
        if not self.shot.lesion or self.shot.view != "tunnel":
            return None
        cx, cy = self.lesion[i]
        unit, size = SHRINK * UNIT, (WIDTH, HEIGHT)
        centre = cx * unit + WIDTH / 2, cy * unit + HEIGHT / 2
        reach = (unit * self.lesion_radius, unit * self.lesion_radius / 1.12)
        left, top = (min(max(round(c - r), 0), most) for c, r, most in zip(centre, reach, size))
        right, bottom = (min(max(round(c + r), 0), most) for c, r, most in zip(centre, reach, size))
        return (left, right, top, bottom) if left < right and top < bottom else None

    # --- the four views

    def _tunnel(self, i: int) -> np.ndarray:
        shot, (cx, cy) = self.shot, self.lumen[i]
        # A lumen that has left the screen far behind stays at the edge of the canvas.
        left = min(max(round(DRAWN_W / 2 - cx * UNIT), 0), DRAWN_W)
        top = min(max(round(DRAWN_H / 2 - cy * UNIT), 0), DRAWN_H)
        window = np.s_[top : top + DRAWN_H, left : left + DRAWN_W]
        ahead = self.reach[window] * self.opening[i]
        along = ahead + self.depth[i]
        fold = self.fold[((along / self.folds_apart + self.bend[window]) % 1 * 1023).astype(np.int32)]
        row = (along * 260 + self.offset[2]).astype(np.int32) % TEXTURE
        column = self.column[window]
        fine = textures()["fine"][row, column]
        vessel = textures()["vessels"][row, column]
        fall = np.minimum(1.08 / (1 + (ahead / 2.3) ** 2.4), 1.0) * screen()[2]
        light = fall * fold * (0.88 + 0.22 * fine)
        picture = look(self.wall, light, vessel * fall).astype(np.float32)
        if shot.dye:
            cloud = textures()["cloud"][row // 2, column]
            amount = np.clip((cloud + 0.35 * (1 - fold) - 0.42) * 4, 0, 0.8)[..., None]
            picture += amount * (DYE * (0.25 + light[..., None] * 0.9) - picture)
        wet = np.clip((fine * fold * fall - 0.78) * 9, 0, 1)[..., None]
        picture += wet * (245 - picture) * 0.85
        if shot.lesion:
            self._lesion(picture, i)
        if shot.flush:
            self._jet(picture, i)
        if shot.tool:
            self._tool(picture, i)
        return picture

    def _fluid(self, i: int) -> np.ndarray:
        x, y, edge = screen()
        cloud = textures()["cloud"]
        shift = int(self.steps[i] * 40)
        rows = (y * 90 + 14 * np.sin(3 * x + 4 * self.steps[i]) + self.offset[0] + shift).astype(np.int32) % TEXTURE
        columns = (x * 90 + 10 * np.sin(4 * y + 2) + self.offset[1] - shift).astype(np.int32) % TEXTURE
        silt = cloud[rows, columns]
        light = (0.28 + 0.75 * silt) * edge
        picture = look(FLUID[self.shot.lighting], light, textures()["fine"][rows, columns] * 0.8).astype(np.float32)
        rise = np.array([0.25 * self.steps[i], -0.5 * self.steps[i], 0])
        for bx, by, radius in (self.bubbles + rise).tolist():
            self._bubble(picture, (bx + 1.2) % 2.4 - 1.2, (by + 1.1) % 2.2 - 1.1, radius)
        return picture

    def _close_up(self, i: int) -> np.ndarray:
        x, y, edge = screen()
        cx = 2 * self.lumen[i][0] + 0.12 * math.cos(3 * self.steps[i])
        cy = 2 * self.lumen[i][1] + 0.12 * math.sin(2 * self.steps[i])
        glow = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.9)
        rows = (y * 30 + self.offset[0] + 9 * self.steps[i]).astype(np.int32) % TEXTURE
        columns = (x * 30 + self.offset[1]).astype(np.int32) % TEXTURE
        light = (0.45 + 0.42 * glow) * edge + 0.10 * (textures()["cloud"][rows, columns] - 0.5)
        return look(self.wall, light, np.full_like(light, 0.25)).astype(np.float32)

    def _outside(self, i: int) -> np.ndarray:
        x, y, edge = screen()
        sway = 0.25 * math.sin(2.2 * self.steps[i] + self.offset[0])
        x, y = x + sway + self.lumen[i][0], y + self.lumen[i][1]
        drape = 1 / (1 + np.exp(-14 * (y - 0.28 - 0.10 * np.sin(2 * x + self.offset[1]))))
        ripple = 0.5 + 0.5 * np.sin(9 * x + 3 * np.sin(2.3 * y + self.offset[2]))
        lamp = np.exp(-((((x + 0.45) / 0.34) ** 2 + ((y + 0.62) / 0.20) ** 2) ** 2))
        monitor = ((np.abs(x - 0.55) < 0.32) & (np.abs(y + 0.22) < 0.24)).astype(np.float32)
        light = (0.62 - 0.12 * y) * (1 - drape) + (0.34 + 0.26 * ripple) * drape
        light = np.clip(light - 0.42 * monitor * (1 - drape) + 0.75 * lamp, 0, 1) * edge
        return look(ROOM, light, drape * 0.9).astype(np.float32)

    # --- what lies over the view

    def _patch(self, cx: float, cy: float, radius: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray] | None:
        """The window around a disc, and its x and y in radii; None when the disc is off the screen."""
        left, right = (int((c * UNIT) + DRAWN_W / 2) for c in (cx - radius, cx + radius))
        top, bottom = (int((c * UNIT) + DRAWN_H / 2) for c in (cy - radius, cy + radius))
        window = np.s_[max(top, 0) : min(bottom + 1, DRAWN_H), max(left, 0) : min(right + 1, DRAWN_W)]
        x, y, _ = screen()
        x, y = x[window], y[window]
        return (window, (x - cx) / radius, (y - cy) / radius) if x.size else None

    def _lesion(self, picture: np.ndarray, i: int) -> None:
        cx, cy = self.lesion[i]
        if (patch := self._patch(cx, cy, self.lesion_radius * 1.35)) is None:
            return
        window, x, y = patch
        x, y = x * 1.35, y * 1.35
        rows = (y * 60 + self.offset[3]).astype(np.int32) % TEXTURE
        columns = (x * 60 + self.offset[2]).astype(np.int32) % TEXTURE
        knobs = textures()["cloud"][rows * 2 % TEXTURE, columns * 2 % TEXTURE]
        distance = np.sqrt(x * x + (y * 1.12) ** 2) + 0.12 * (knobs - 0.5)
        height = np.sqrt(np.clip(1 - distance**2, 0, 1))
        towards = -(x * (cx - self.lumen[i][0]) + y * (cy - self.lumen[i][1]))
        light = 0.34 + 0.5 * height + 0.22 * towards + 0.22 * (knobs - 0.5)
        colour = look(LESION[self.shot.lighting], light, textures()["vessels"][rows, columns] * 0.9)
        shine = np.clip((height * (0.7 + 0.6 * knobs) + 0.2 * towards - 0.97) * 6, 0, 1)[..., None]
        shadow = np.clip(1.25 - distance, 0, 0.3)[..., None] * 1.6
        cover = np.clip((1 - distance) * 14, 0, 1)[..., None]
        under = picture[window]
        under *= 1 - shadow
        under += cover * (colour + shine * (250 - colour) - under)

    def _bubble(self, picture: np.ndarray, cx: float, cy: float, radius: float) -> None:
        if (patch := self._patch(cx, cy, radius)) is None:
            return
        window, x, y = patch
        distance = np.sqrt(x * x + y * y)
        rim = (
            np.exp(-(((distance - 0.82) / 0.12) ** 2)) * 0.6 + np.exp(-((x + 0.35) ** 2 + (y + 0.4) ** 2) / 0.03) * 0.9
        )
        picture[window] += np.clip(rim, 0, 1)[..., None] * (238 - picture[window]) * (distance < 1)[..., None]

    def _jet(self, picture: np.ndarray, i: int) -> None:
        """A jet of water from below, with spray around where it lands."""
        x, y, _ = screen()
        foot, tip = np.array([0.18, 1.1]), np.array(self.lumen[i]) * 0.25 + (0, 0.3)
        along, across, length = _axis(x, y, foot, tip)
        width = 0.24 + 0.50 * np.clip(along / length, 0, 1.2)
        columns = (np.clip(across / width, -2, 2) * 60 + self.offset[0]).astype(np.int32) % TEXTURE
        rows = (along * 50 + i * 71).astype(np.int32) % TEXTURE
        streak = textures()["fine"][rows, columns]
        inside = np.exp(-((across / width) ** 2) * 1.6) * (along > 0) * np.clip((length * 1.05 - along) * 8, 0, 1)
        amount = np.clip(inside * (0.65 + 0.8 * streak), 0, 0.95)[..., None]
        picture += amount * (np.array((226, 240, 250), np.float32) - picture)
        rng = np.random.default_rng([self.shot.number, i])
        for dx, dy, size in zip(rng.normal(0, 0.4, 50), rng.normal(0, 0.16, 50), rng.uniform(0.015, 0.06, 50)):
            self._bubble(picture, float(tip[0] + dx), float(tip[1] + dy), float(size))

    def _tool(self, picture: np.ndarray, i: int) -> None:
        """Forceps: a steel coil and two open jaws. Catheter: a smooth blue tube with a dark tip."""
        foot = np.array([self.tool_side * 1.0, 1.15])
        tip = self.tool_tip + 0.03 * np.array([np.sin(5 * self.steps[i]), np.cos(4 * self.steps[i])])
        if self.shot.tool == "catheter":
            _tube(picture, foot, tip, 0.17, (64, 126, 226), bands=0.0)
            _tube(picture, tip + 0.12 * _unit(foot - tip), tip, 0.172, (24, 30, 44), bands=0.0)
            return
        _tube(picture, foot, tip, 0.165, (150, 154, 160), bands=30.0)
        ahead = _unit(tip - foot)
        side = np.array([-ahead[1], ahead[0]])
        for way in (-1, 1):
            knee = tip + 0.18 * ahead + way * 0.16 * side
            _tube(picture, tip, knee, 0.06, (160, 162, 166), bands=0.0)
            _tube(picture, knee, knee + 0.22 * ahead - way * 0.05 * side, 0.07, (170, 172, 176), bands=0.0)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _axis(x: np.ndarray, y: np.ndarray, foot: np.ndarray, tip: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Each point's way along and across the axis from foot to tip, and the axis' length."""
    ux, uy = _unit(tip - foot).tolist()
    dx, dy = x - float(foot[0]), y - float(foot[1])
    return dx * ux + dy * uy, dx * uy - dy * ux, float(np.linalg.norm(tip - foot))


def _tube(
    picture: np.ndarray, foot: np.ndarray, tip: np.ndarray, radius: float, colour: tuple[int, int, int], bands: float
) -> None:
    """A lit cylinder with a round end; `bands` rings a unit of length."""
    corners = np.stack([foot, tip])
    low = ((corners.min(0) - radius) * UNIT + (DRAWN_W / 2, DRAWN_H / 2)).astype(int)
    high = ((corners.max(0) + radius) * UNIT + (DRAWN_W / 2, DRAWN_H / 2)).astype(int) + 1
    window = np.s_[max(low[1], 0) : max(high[1], 0), max(low[0], 0) : max(high[0], 0)]
    x, y, _ = screen()
    along, across, length = _axis(x[window], y[window], foot, tip)
    beyond = np.maximum(np.maximum(along - length, -along), 0)
    distance = np.sqrt(across**2 + beyond**2) / radius
    light = 0.30 + 0.75 * np.sqrt(np.clip(1 - (across / radius + 0.25) ** 2, 0, 1))
    if bands:
        light *= 0.84 + 0.16 * np.sin(along * bands * 2 * np.pi / 3)
    cover = np.clip((1 - distance) * radius * UNIT / 1.5, 0, 1)[..., None]
    shine = np.clip(1 - ((across / radius + 0.4) / 0.14) ** 2, 0, 1)[..., None] * 90
    lit = np.clip(np.array(colour, np.float32) * light[..., None] + shine, 0, 255)
    picture[window] += cover * (lit - picture[window])
