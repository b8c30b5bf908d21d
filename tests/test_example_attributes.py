"""The example on attributes: its reduced form, its loader, and the figures of its page."""

import json
from argparse import Namespace
from pathlib import Path

import attributes
import attributes_data
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
HEADER = ["Bald", "Male", "Young"]
VALUES = [[-1, 1, 1], [1, 1, -1], [-1, -1, 1]]


@pytest.fixture(scope="module")
def record():
    return attributes.run(Namespace(full=False, data=None, seed=7))


@pytest.fixture
def csv_folder(tmp_path):
    lines = [["image_id", *HEADER], *([f"{i:06}.jpg", *row] for i, row in enumerate(VALUES))]
    text = "\n".join(",".join(map(str, line)) for line in lines)
    (tmp_path / "list_attr_celeba.csv").write_text(text + "\n")
    return tmp_path


def test_exact_selections_are_cheaper_and_tell_more(record):
    methods = record["methods"]
    for noise in attributes.NOISE:
        randomised = methods[f"noise {noise:g}"]
        assert 2 * methods["exact"]["seconds"][0] < randomised["seconds"][0]
        assert methods["exact"]["T"][0] > randomised["T"][0]
        assert randomised["between seeds"][0] < 0.9
    assert record["published_ratio"] > 100


def test_exact_selections_repeat(record):
    _, table, other = attributes_data.halves(None, 2000, 7)
    size = attributes.SIZES[False]
    k = attributes_data.NAMES.index("Bald")
    repeated = attributes.one_attribute(table, other, k, size | {"seeds": 2}, seed=3)
    columns, _ = attributes.select(table, k, 0, 12345, size["columns"])
    assert repeated["exact"]["columns"] == [columns]
    assert k not in columns


def test_what_is_printed_and_drawn(record, tmp_path):
    shown = attributes.show(record)
    for method, found in record["methods"].items():
        assert f"{method:<12}{found['columns'][0]:>9.1f}" in shown
    attributes.draw(record, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_generated_attributes_are_as_frequent_as_in_celeba():
    values = attributes_data.generated(20_000, 5)
    assert values.shape == (20_000, 40)
    assert set(np.unique(values)) == {-1, 1}
    shares = np.array([share for share, _ in attributes_data.MODEL.values()])
    assert abs((values > 0).mean(axis=0) - shares).max() < 0.02
    male, beardless = (attributes_data.NAMES.index(name) for name in ("Male", "No_Beard"))
    assert np.corrcoef(values[:, male], values[:, beardless])[0, 1] < -0.3


def test_celeba_in_both_layouts(csv_folder, tmp_path_factory):
    names, values = attributes_data.celeba(csv_folder)
    assert names == tuple(HEADER)
    assert values.tolist() == VALUES
    folder = tmp_path_factory.mktemp("txt")
    lines = ["3", " ".join(HEADER) + " "]
    lines += [f"{i:06}.jpg " + " ".join(f"{v:2d}" for v in row) for i, row in enumerate(VALUES)]
    (folder / "list_attr_celeba.txt").write_text("\r\n".join(lines) + "\r\n")
    again, same = attributes_data.celeba(folder)
    assert again == names
    assert (same == values).all()


def test_rows_of_celeba_are_shuffled_and_halved(csv_folder):
    _, table, other = attributes_data.halves(csv_folder, 1, 0)
    assert len(table) == len(other) == 1
    assert table.tolist()[0] in VALUES
    assert table.tolist() != other.tolist()


def test_files_that_cannot_be_used(csv_folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(SystemExit, match=r"neither list_attr_celeba\.csv nor .*\.txt"):
        attributes_data.celeba(empty)
    file = csv_folder / "list_attr_celeba.csv"
    good = file.read_text()
    for bad in ("a.jpg,1,1\n", "a.jpg,1,1,0\n"):
        file.write_text(good + bad)
        with pytest.raises(SystemExit, match="row 4 of list_attr_celeba.csv"):
            attributes_data.celeba(csv_folder)
    file.write_text("image_id,Bald,Male\n")
    with pytest.raises(SystemExit, match="has 0 rows of 2 attributes"):
        attributes_data.celeba(csv_folder)
    file.write_text("")
    with pytest.raises(SystemExit, match="holds no header"):
        attributes_data.celeba(csv_folder)


def test_the_page_has_the_figures_of_the_record():
    record = json.loads((ROOT / "examples/results/attributes.json").read_text())
    page = (ROOT / "docs/experiments/attributes.md").read_text()
    methods = record["methods"]
    for method, found in methods.items():
        cells = [
            f"{found['seconds'][0]:.3f}" if method == "exact" else f"{found['seconds'][0]:.2f}"
        ]
        cells.append(f"{found['columns'][0]:.1f}")
        for key in ("with the exact", "between seeds", "on other rows"):
            cells.append(f"{found[key][0]:.2f} ± {found[key][1]:.2f}" if key in found else "")
        cells.append(f"{found['T'][0]:.3f}")
        assert f"| {method} | " + " | ".join(cells) + " |" in page
    assert f"{record['published_seconds'][0]:,.0f} s" in page
    assert f"{record['all_attributes']['seconds'][0]:.3f} s each" in page
    assert f"agree by {record['all_attributes']['on other rows'][0]:.2f}" in page
    for one in record["without_a_limit"]:
        parts = one["exact"], one["noise 0.01"], one["exact, by a test"]
        row = [f"{one['attribute']}"]
        for part in parts:
            row += [f"{part['columns']}", f"{part['seconds']:.1f}", f"{part['T']:.3f}"]
        assert "| " + " | ".join(row) + " |" in page
    assert record["dirty"] is False
