"""The example on faces: its images, the loaders of both layouts, and the networks."""

import json
from dataclasses import replace
from pathlib import Path

import faces
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
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


def test_the_default_keeps_the_accuracy_on_other_identities():
    size = faces.REDUCED
    data = faces.split(faces.faces_of(None, size, 0), size, 0)
    model = faces.train(data.x, data.y, data.classes, size, 0)
    found = faces.default_stream(model, data, size, 0)["points"]
    assert [p["removed"] for p in found] == [0, 10, 20]
    assert found[0]["residual"] > 0.6
    assert found[-1]["residual"] >= 0.95 * found[0]["residual"]


def test_the_paper_s_way_changes_one_unit_a_sample():
    size = replace(faces.REDUCED, identities=4, train=12, epochs=4, removals=2)
    data = faces.split(faces.faces_of(None, size, 0), size, 0)
    model = faces.train(data.x, data.y, data.classes, size, 0)
    found = faces.paper_stream(model, data, size, 0, faces.noise())
    assert [p["removed"] for p in found["points"]] == [0, 1, 2]


def test_the_page_has_the_table_of_the_record():
    record = json.loads((ROOT / "examples/results/faces.json").read_text())
    page = (ROOT / "docs/experiments/faces.md").read_text()
    assert faces.show(record) in page
    for way, share in record["residual_kept"].items():
        assert f"| {way} | {share:.3f} |" in page
    assert f"{record['sigma']:.4f}" in page
    assert f"{record['sigma_of_own_n']:.0f}" in page
