"""The example on faces: its images, the loaders of both layouts, and the networks."""

from dataclasses import replace

import faces
import numpy as np
import pytest
import torch
from PIL import Image

SMALL = replace(faces.REDUCED, identities=2, train=2, validation=1, test=1)


def save(file, shade):
    file.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((40, 60, 3), shade, np.uint8)).save(file)


def test_generated_faces_are_seeded_and_differ_more_between_identities():
    drawn = faces.generate(6, 12, 32, seed=1)
    assert drawn.shape == (6, 12, 3, 32, 32)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    np.testing.assert_array_equal(drawn, faces.generate(6, 12, 32, seed=1))
    means = drawn.mean(1)
    between = means.var(0).mean()
    assert between > 2 * drawn.var(1).mean() / 12  # more than means of 12 images differ by chance


def test_vgg_16_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = faces.Vgg(16, 1000)
    assert sum(p.numel() for p in model.parameters()) == 138_357_544


def test_a_folder_for_each_person_is_read(tmp_path):
    for name, shade in (("anna", 0), ("bert", 255)):
        for i in range(4):
            save(tmp_path / name / f"{i}.png", shade)
    save(tmp_path / "carl" / "0.png", 100)  # too few
    found = faces.read(tmp_path, SMALL)
    assert found.shape == (2, 4, 3, 32, 32)
    assert (found[0] == 0).all()
    assert (found[1] == 1).all()


def test_names_and_table_are_read(tmp_path):
    rows = ["Person,FilePath,Target,MyCuration"]
    for name in ("anna", "bert", "other"):
        for i in range(4):
            save(tmp_path / f"{name}{i}.png", 0)
            rows.append(f"{name},{name}{i}.png,0,1")
    (tmp_path / "names.txt").write_text("anna\nbert\n")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    assert set(faces.photographs(tmp_path)) == {"anna", "bert"}
    assert len(faces.read(tmp_path, SMALL)) == 2


def test_errors_name_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="has no images"):
        faces.read(tmp_path, SMALL)
    save(tmp_path / "anna" / "0.png", 0)
    with pytest.raises(SystemExit, match="has 0 people with at least 4 photographs"):
        faces.read(tmp_path, SMALL)
    (tmp_path / "names.txt").write_text("anna\n")
    with pytest.raises(SystemExit, match="lacks a CSV file"):
        faces.read(tmp_path, SMALL)
    (tmp_path / "table.csv").write_text("Person\nanna\n")
    with pytest.raises(SystemExit, match="lacks the columns FilePath"):
        faces.read(tmp_path, SMALL)
    lines = [f"anna,{i}.png\nbert,{i}.png" for i in range(4)]
    (tmp_path / "names.txt").write_text("anna\nbert\n")
    (tmp_path / "table.csv").write_text("Person,FilePath\n" + "\n".join(lines))
    with pytest.raises(SystemExit, match="is listed and does not exist"):
        faces.read(tmp_path, SMALL)
