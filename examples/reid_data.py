"""Data of the re-identification example: Market1501's folders, and generated pedestrians."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
NAME = re.compile(r"^(-1|\d{4})_c(\d)s\d_\d{6}_\d{2}\.jpg$")
JUNK, DISTRACTOR = -1, 0  # identities of Market1501 that are nobody's
MEAN, SPREAD = 0.45, 0.25  # of pixels between 0 and 1
HELD = 5  # every fifth image of a training identity is held out


@dataclass
class Crops:
    """Images of people: (n, 3, height, width), whose they are, and the camera of each."""

    images: Tensor
    person: np.ndarray
    camera: np.ndarray

    def __len__(self) -> int:
        return len(self.person)

    def __getitem__(self, some) -> "Crops":
        return Crops(self.images[torch.as_tensor(some)], self.person[some], self.camera[some])

    def __add__(self, other: "Crops") -> "Crops":
        return Crops(
            torch.cat([self.images, other.images]),
            np.concatenate([self.person, other.person]),
            np.concatenate([self.camera, other.camera]),
        )


def market(folder: Path, height: int) -> dict[str, Crops]:
    """Read bounding_box_train, query and bounding_box_test, resized to height x height / 2."""
    missing = [name for name in FOLDERS.values() if not (folder / name).is_dir()]
    if missing:
        raise SystemExit(
            f"--data: {folder} lacks {', '.join(missing)}. It has to be the unpacked folder "
            f"Market-1501-v15.09.15, with {', '.join(FOLDERS.values())} in it"
        )
    return {key: _crops(folder / name, height) for key, name in FOLDERS.items()}


def _crops(folder: Path, height: int) -> Crops:
    from PIL import Image

    files = sorted(folder.glob("*.jpg"))
    if not files:
        raise SystemExit(f"--data: {folder} has no .jpg file")
    found = [NAME.match(file.name) for file in files]
    wrong = [file.name for file, match in zip(files, found, strict=True) if match is None]
    if wrong:
        raise SystemExit(
            f"--data: {len(wrong)} names in {folder} are not of the form 0002_c1s1_000451_03.jpg "
            f"(identity, camera and sequence, frame, box): {wrong[0]}"
        )
    pixels = np.empty((len(files), height, height // 2, 3), np.uint8)
    for k, file in enumerate(files):
        with Image.open(file) as image:
            pixels[k] = image.convert("RGB").resize((height // 2, height))
    person, camera = (np.array([int(match[part]) for match in found]) for part in (1, 2))
    return Crops(_scaled(pixels), person, camera)


def _scaled(pixels: np.ndarray) -> Tensor:
    """Pixels from 0 to 255 as the networks take them."""
    images = torch.tensor(pixels).permute(0, 3, 1, 2).float() / 255
    return ((images - MEAN) / SPREAD).contiguous()


def pixels_of(images: Tensor) -> np.ndarray:
    """Images as pixels between 0 and 1, for a figure."""
    return (images * SPREAD + MEAN).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def split(crops: Crops) -> tuple[Crops, Crops]:
    """Training images, and every fifth of each identity, which no network is trained on.

    The images of an identity are in the order of their names, so that cameras take turns.
    """
    order = np.argsort(crops.person, kind="stable")
    starts = np.searchsorted(crops.person[order], crops.person[order])
    held = np.zeros(len(crops), bool)
    held[order] = (np.arange(len(crops)) - starts) % HELD == HELD // 2
    return crops[np.flatnonzero(~held)], crops[np.flatnonzero(held)]


# ---------------------------------------------------------------------------------------------
# Generated pedestrians


def generated(
    seed: int, trained: int, tested: int, per_camera: int, height: int = 64, cameras: int = 3
) -> dict[str, Crops]:
    """Pedestrians of parametric shapes, with the parts and the identities of Market1501.

    An identity is a build, clothes and their colours, hair, a gait and perhaps a bag. A camera is
    a colour balance, a point of view, a background and noise. Identities of the test are others
    than those of the training. The gallery has distractors, and junk: boxes beside the person.
    """
    rng = np.random.default_rng(seed)
    views = [_camera(rng, number) for number in range(cameras)]
    people = [_person(rng) for _ in range(trained + tested)]
    parts: dict[str, list] = {key: [] for key in FOLDERS}
    for number, person in enumerate(people, 1):
        for c, view in enumerate(views, 1):
            for k in range(per_camera if number <= trained else 5):
                key = "train" if number <= trained else "query" if k == 0 else "gallery"
                parts[key].append((_drawn(rng, person, view, height), number, c))
    for k in range(tested):
        c = k % cameras
        stranger = _drawn(rng, _person(rng), views[c], height)
        beside = _drawn(rng, people[trained + k], views[c], height, beside=True)
        parts["gallery"] += [(stranger, DISTRACTOR, c + 1), (beside, JUNK, c + 1)]
    return {
        key: Crops(_scaled(np.stack(pixels)), np.array(person), np.array(camera))
        for key, (pixels, person, camera) in (
            (key, zip(*found, strict=True)) for key, found in parts.items()
        )
    }


def _person(rng) -> dict:
    """An identity: what stays the same from image to image."""
    colours = np.array(
        [
            *([0.1, 0.1, 0.12], [0.85, 0.85, 0.82], [0.45, 0.45, 0.47], [0.65, 0.15, 0.15]),
            *([0.15, 0.25, 0.6], [0.15, 0.45, 0.2], [0.75, 0.6, 0.2], [0.4, 0.25, 0.5]),
        ]
    )

    def shade():
        return np.clip(colours[rng.integers(len(colours))] + rng.normal(0, 0.05, 3), 0, 1)

    return {
        "build": rng.uniform(0.8, 1.25),
        "hip": rng.uniform(0.5, 0.6),
        "skin": np.array([0.8, 0.6, 0.5]) * rng.uniform(0.45, 1.1),
        "hair": np.array([0.3, 0.2, 0.12]) * rng.uniform(0.2, 2.2),
        "long_hair": rng.random() < 0.4,
        "shirt": shade(),
        "stripes": shade() if rng.random() < 0.35 else None,
        "sleeves": rng.random() < 0.6,
        "trousers": shade(),
        "short": rng.uniform(0.7, 0.8) if rng.random() < 0.3 else 1.0,
        "skirt": rng.random() < 0.2,
        "bag": rng.choice(["none", "left", "right", "back"]),
        "bag_colour": shade(),
        "stride": rng.uniform(0.04, 0.14),
    }


def _camera(rng, number: int) -> dict:
    """What a camera does to all of its images."""
    return {
        "gain": rng.uniform(0.65, 1.25, 3) * rng.uniform(0.8, 1.1),
        "offset": rng.normal(0, 0.04, 3),
        "shift": rng.normal(0, 0.04, 2),
        "zoom": rng.uniform(0.85, 1.12),
        "lean": rng.normal(0, 0.08),
        "ground": rng.uniform(0.25, 0.75, 3),
        "wall": rng.uniform(0.25, 0.75, (4, 3, 3)),
        "noise": 0.04 + 0.02 * number,
    }


def _drawn(rng, person: dict, view: dict, height: int, beside: bool = False) -> np.ndarray:
    """One image of a person, (height, height / 2, 3)."""
    y, x = np.mgrid[0:height, 0 : height // 2] / height + 0.5 / height
    image = np.kron(view["wall"], np.ones((height // 4, height // 6 + 1, 1)))
    image = np.roll(image, rng.integers(height), 1)[:height, : height // 2]
    image = np.where((y > 0.8 + rng.normal(0, 0.03))[..., None], view["ground"], image)
    dy, dx = view["shift"] + rng.normal(0, 0.025, 2)
    zoom = view["zoom"] * rng.uniform(0.93, 1.07)
    v = (y - 0.5 - dy) / zoom + 0.5
    u = (x - 0.25 - dx - 0.4 * beside) / zoom / person["build"] + view["lean"] * (v - 0.5)
    u = u * rng.choice([-1, 1])  # which way they walk
    image = _dressed(image, u, v, person, rng.uniform(-1, 1), rng.choice([-1, 1]))
    if rng.random() < 0.15:  # something stands before them
        image = np.where((y > rng.uniform(0.6, 0.9))[..., None], view["wall"][0, 0], image)
    image = image * view["gain"] * rng.uniform(0.85, 1.15) + view["offset"]
    image = image + rng.normal(0, view["noise"], image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _dressed(image, u, v, person: dict, phase: float, side: int) -> np.ndarray:
    """Paint the parts of a person, from the back to the front; u is 0 along the spine."""
    hip, swing = person["hip"], person["stride"] * phase
    legs, below = person["trousers"], np.clip((v - hip) / (0.97 - hip), 0, 1)

    def paint(image, where, colour):
        return np.where(where[..., None], colour, image)

    for s in (-1, 1):  # legs, then arms
        leg = (np.abs(u - s * (0.035 + swing * below)) < 0.035) & (v > hip - 0.02) & (v < 0.97)
        image = paint(image, leg, person["skin"])
        image = paint(image, leg & (below < person["short"]), legs)
        image = paint(image, leg & (below > 0.93), [0.1, 0.1, 0.1])
        arm = (np.abs(u - s * (0.095 + swing * (v - 0.25))) < 0.022) & (v > 0.22) & (v < 0.56)
        sleeve = arm & ((v < 0.36) | person["sleeves"])
        image = paint(paint(image, arm, person["skin"]), sleeve, person["shirt"] * 0.85)
    if person["skirt"]:
        image = paint(image, (np.abs(u) < 0.06 + 0.06 * below) & (v > hip) & (below < 0.45), legs)
    trunk = (np.abs(u) < 0.085 - 0.02 * np.abs(v - 0.4)) & (v > 0.2) & (v < hip)
    image = paint(image, trunk, person["shirt"])
    if person["stripes"] is not None:
        image = paint(image, trunk & ((v * 18) % 1 < 0.45), person["stripes"])
    if person["bag"] == "back":
        where = (np.abs(u - 0.07 * side) < 0.05) & (v > 0.24) & (v < 0.44)
        image = paint(image, where, person["bag_colour"])
    elif person["bag"] != "none":
        hand = 0.12 if person["bag"] == "left" else -0.12
        where = (np.abs(u - hand) < 0.04) & (v > 0.5) & (v < 0.64)
        image = paint(image, where, person["bag_colour"])
    hair = (u / 0.055) ** 2 + ((v - 0.125) / 0.07) ** 2 < 1
    face = (u / 0.045) ** 2 + ((v - 0.14) / 0.055) ** 2 < 1
    if person["long_hair"]:
        image = paint(image, (np.abs(u) < 0.055) & (v > 0.12) & (v < 0.25), person["hair"])
    return paint(paint(image, hair, person["hair"]), face, person["skin"])
