"""Binary attributes of faces: CelebA's own file, or generated ones of the same layout."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FILES = ("list_attr_celeba.csv", "list_attr_celeba.txt")
FACTORS = ("masculine", "age", "smile", "weight", "grooming", "hair", "beard")
# Attribute: how often it is there (CelebA's share), and its loadings on factors. What the factors
# leave of the variance 1 is the attribute's own.
MODEL: dict[str, tuple[float, dict[str, float]]] = {
    "5_o_Clock_Shadow": (0.111, {"masculine": 0.6, "beard": 0.4}),
    "Arched_Eyebrows": (0.267, {"masculine": -0.5, "grooming": 0.4}),
    "Attractive": (0.513, {"masculine": -0.4, "age": -0.5, "weight": -0.3, "grooming": 0.3}),
    "Bags_Under_Eyes": (0.205, {"masculine": 0.3, "age": 0.4}),
    "Bald": (0.022, {"masculine": 0.5, "age": 0.5, "hair": 0.4}),
    "Bangs": (0.152, {"masculine": -0.3, "hair": -0.4}),
    "Big_Lips": (0.241, {"masculine": -0.2, "grooming": 0.2}),
    "Big_Nose": (0.235, {"masculine": 0.4, "age": 0.3, "weight": 0.3}),
    "Black_Hair": (0.239, {"age": -0.2, "hair": 0.6}),
    "Blond_Hair": (0.148, {"masculine": -0.5, "hair": -0.5}),
    "Blurry": (0.051, {"grooming": -0.2}),
    "Brown_Hair": (0.205, {"age": -0.2, "hair": -0.4}),
    "Bushy_Eyebrows": (0.142, {"masculine": 0.4, "hair": 0.4}),
    "Chubby": (0.058, {"age": 0.3, "weight": 0.8}),
    "Double_Chin": (0.047, {"age": 0.4, "weight": 0.7}),
    "Eyeglasses": (0.065, {"masculine": 0.3, "age": 0.4}),
    "Goatee": (0.063, {"masculine": 0.5, "beard": 0.7}),
    "Gray_Hair": (0.042, {"masculine": 0.3, "age": 0.8}),
    "Heavy_Makeup": (0.387, {"masculine": -0.7, "grooming": 0.6}),
    "High_Cheekbones": (0.455, {"masculine": -0.2, "smile": 0.8}),
    "Male": (0.417, {"masculine": 0.98}),
    "Mouth_Slightly_Open": (0.483, {"smile": 0.7}),
    "Mustache": (0.042, {"masculine": 0.5, "beard": 0.6}),
    "Narrow_Eyes": (0.115, {"smile": 0.2}),
    "No_Beard": (0.835, {"masculine": -0.6, "beard": -0.75}),
    "Oval_Face": (0.284, {"masculine": -0.2, "weight": -0.3}),
    "Pale_Skin": (0.043, {"masculine": -0.2, "hair": -0.3}),
    "Pointy_Nose": (0.277, {"masculine": -0.3, "weight": -0.3}),
    "Receding_Hairline": (0.080, {"masculine": 0.3, "age": 0.6}),
    "Rosy_Cheeks": (0.066, {"masculine": -0.4, "smile": 0.4, "grooming": 0.3}),
    "Sideburns": (0.057, {"masculine": 0.5, "beard": 0.6}),
    "Smiling": (0.482, {"smile": 0.9}),
    "Straight_Hair": (0.208, {"masculine": 0.1, "hair": 0.2}),
    "Wavy_Hair": (0.320, {"masculine": -0.5, "hair": -0.3}),
    "Wearing_Earrings": (0.189, {"masculine": -0.5, "grooming": 0.4}),
    "Wearing_Hat": (0.048, {"masculine": 0.3, "hair": 0.2}),
    "Wearing_Lipstick": (0.472, {"masculine": -0.85, "grooming": 0.45}),
    "Wearing_Necklace": (0.123, {"masculine": -0.4, "grooming": 0.3}),
    "Wearing_Necktie": (0.073, {"masculine": 0.5, "age": 0.4}),
    "Young": (0.774, {"age": -0.85}),
}
NAMES = tuple(MODEL)


def generated(rows: int, seed: int) -> NDArray[np.float64]:
    """Rows of the 40 attributes: signs of sums of normal factors, as frequent as in CelebA."""
    from scipy.special import ndtri

    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((rows, len(FACTORS)))
    weights = np.array([[of.get(name, 0.0) for name in FACTORS] for _, of in MODEL.values()])
    own = np.sqrt(1 - np.square(weights).sum(axis=1))
    scores = factors @ weights.T + own * rng.standard_normal((rows, len(NAMES)))
    return np.where(scores > -ndtri([share for share, _ in MODEL.values()]), 1.0, -1.0)


def celeba(folder: Path) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Names and values of CelebA's file of attributes, as published (.txt) or as .csv."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise SystemExit(f"--data: {folder} holds neither {FILES[0]} nor {FILES[1]}")
    file = found[0]
    with file.open(newline="") as lines:
        if file.suffix == ".csv":
            table = [row for row in csv.reader(lines) if row]
            names = 0
        else:  # the number of rows, the names, then a file's name and its values in each line
            table = [line.split() for line in lines if line.strip()]
            names = 1
    if len(table) <= names:
        raise SystemExit(f"--data: {file.name} holds no header")
    header, rows = table[names][1 - names :], table[names + 1 :]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header) + 1 or not {"-1", "1"}.issuperset(row[1:]):
            raise SystemExit(
                f"--data: row {number} of {file.name} has {len(row) - 1} values after the image's "
                f"name; expected {len(header)} values that are -1 or 1"
            )
    if not rows or len(header) < 2:
        raise SystemExit(f"--data: {file.name} has {len(rows)} rows of {len(header)} attributes")
    return tuple(header), np.array([row[1:] for row in rows], dtype=np.float64)


def halves(folder: Path | None, rows: int, seed: int):
    """Names, and two tables of other rows: for selecting, and for judging what was selected."""
    if folder is None:
        names, values = NAMES, generated(2 * rows, seed)
    else:
        names, values = celeba(folder)
        values = values[np.random.default_rng(seed).permutation(len(values))[: 2 * rows]]
    middle = len(values) // 2
    return names, values[:middle], values[middle:]
