"""Labels that look right and are not: told before anything is scored, trained or judged by them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from secateur.bench.pictures import _pictures
from secateur.bundle.runner import DENSE_KINDS as RUNNER_KINDS
from secateur.bundle.runner import decode
from secateur.core import registry
from secateur.core.errors import DataError, RuntimeMissing
from secateur.core.model import ModelInput
from secateur.core.task import Task
from secateur.data.archive import ImageArchive
from secateur.data.folder import create
from secateur.data.labels import DENSE, check_known
from secateur.data.loading import InMemory, open_reader
from secateur.data.sample import Array, Sample
from secateur.data.transforms import View, fit_sample, target_tensor
from secateur.flow.job import _check_apart
from secateur.flow.recipe import TaskSpec
from secateur.zoo.compose import DENSE_KINDS as ZOO_KINDS

SPEC = ModelInput(3, 8, 8, (0, 0, 0), (1, 1, 1))
IMAGE = np.zeros((8, 8, 3), np.uint8)


@dataclass
class Stored:
    """A reader of samples with one label, ``t``; it counts how many are looked at."""

    values: Sequence[Array]
    looked_at: int = 0
    fingerprint: str = "x"
    label_names: frozenset[str] = frozenset({"t"})

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Sample:
        self.looked_at += 1
        return Sample(str(index), IMAGE, {"t": self.values[index]})


def task(kind: str, classes: int | None = None) -> Task:
    return Task("t", "t", kind, "t", classes)


def mask(*values: int) -> Array:
    return np.resize(np.array(values, np.uint8), (8, 8))


@pytest.mark.parametrize("kind", ["segmentation", "edges"])
def test_a_mask_of_0_and_255_has_one_class_and_is_refused(kind: str) -> None:
    """Else whoever says background everywhere is always right."""
    with pytest.raises(DataError, match="no value but 0 and 255, which stands for unknown"):
        check_known(Stored([mask(0), *[mask(0, 255)] * 40]), [task(kind, 2)])


@pytest.mark.parametrize("values", [
    [mask(0, 255)] * 39 + [mask(1)],  # the last image alone shows the second class
    [mask(0)] * 40,                   # no object in sight, and nothing unknown either
    [mask(255)] * 40,                 # nothing is known: another check's business
    [mask(2), mask(255), mask(2)],    # few images may show one class
    [mask(3, 255)] * 40,              # no mask of 0 and 255
])  # fmt: skip
def test_one_class_in_most_images_is_no_fault(values: list[Array]) -> None:
    check_known(Stored(values), [task("segmentation", 2)])


def test_a_large_set_is_not_read_to_its_end() -> None:
    reader = Stored([mask(255)] * 5000)
    check_known(reader, [task("segmentation", 2)])
    assert reader.looked_at <= 512


def test_two_classes_in_the_first_image_are_enough() -> None:
    reader = Stored([mask(0, 1)] * 1000)
    check_known(reader, [task("segmentation", 2)])
    assert reader.looked_at == 1


@pytest.mark.parametrize(("kind", "label", "says"), [
    ("depth", np.full((8, 8), 2500, np.uint16), "holds uint16, expected metres"),
    ("normals", np.full((8, 8, 3), 127, np.uint8), "holds uint8, expected unit vectors"),
    ("normals", np.full((8, 8, 3), 127.0), "the value 127, expected components of unit vectors"),
    ("edges", np.full((8, 8), 128, np.uint8), "the value 128, expected 1 on edges"),
    ("multilabel", np.array([1.0, -1.0]), "the value -1, expected 1 or 0"),
    ("multilabel", np.array([1.0, np.nan]), "the value nan, expected 1 or 0"),
])  # fmt: skip
def test_values_that_a_kind_cannot_have_are_told(kind: str, label: Array, says: str) -> None:
    wanted = task(kind, 2 if kind == "multilabel" else None)
    with pytest.raises(DataError, match=f"sample s7 (has )?{says}"):
        target_tensor(Sample("s7", IMAGE, {"t": label}), wanted, SPEC)


def test_a_view_without_its_edge_is_no_picture_of_edges() -> None:
    """A border that is unknown and one edge, which the crop leaves out."""
    label = mask(0).copy()
    label[0], label[7, 7] = 255, 1
    seen = target_tensor(Sample("s7", IMAGE, {"t": label}), task("edges"), SPEC, View(zoom=2.0))
    assert set(seen.unique().tolist()) == {0, 255}


def test_two_tasks_may_read_one_label() -> None:
    """An auxiliary head beside the main one; the input has another shape than the picture."""
    sample = Sample("s7", np.zeros((12, 16, 3), np.uint8), {"t": np.eye(12, 16, dtype=np.uint8)})
    both = [Task(name, name, "segmentation", "t", 2) for name in ("main", "auxiliary")]
    fitted = fit_sample(sample, SPEC, both)
    assert fitted.labels["t"].shape == (8, 8)
    for each in both:
        assert target_tensor(fitted, each, SPEC).equal(target_tensor(sample, each, SPEC))


@pytest.mark.parametrize(("classes", "given", "unknown"), [
    (13, None, 255), (255, None, 255), (256, None, -1), (1000, None, -1), (1000, 0, 0),
    (None, None, 255),
])  # fmt: skip
def test_a_class_is_never_taken_for_unknown_unless_asked(
    classes: int | None, given: int | None, unknown: int
) -> None:
    spec = TaskSpec(output="0", kind="classification", classes=classes, ignore_index=given)
    assert spec.unknown_class() == unknown


def test_the_kinds_of_maps_are_the_same_everywhere() -> None:
    """The bundle's runner stands alone, and heads are made without knowing of data."""
    assert {*RUNNER_KINDS} == DENSE == ZOO_KINDS


@pytest.mark.parametrize(("classes", "kind"), [(100, np.uint8), (150, np.uint8), (300, np.uint16)])
def test_many_classes_are_drawn_and_decoded(classes: int, kind: type) -> None:
    """OpenCV 5 resizes 128 channels at a time; the last class stands in the last of them."""
    logits = np.zeros((classes, 4, 4), np.float32)
    logits[classes - 1] = 1
    found = decode(logits[None], {"kind": "segmentation"}, (8, 12))
    assert found.shape == (8, 12) and found.dtype == kind and (found == classes - 1).all()
    truth, answer = _pictures(task("segmentation", classes), found, [logits], (8, 12))
    assert np.array_equal(truth, answer)


def write(root: Path, names: Sequence[str], csv: str = "") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), IMAGE)
    if csv:
        (root / "labels.csv").write_text(csv, encoding="utf-8")
    return root


@pytest.mark.parametrize(("names", "csv", "says"), [
    (["a.png", "a.jpg"], "", "a.jpg and a.png in .* have one name"),
    (["a.png"], "name,age\na.png,3\na.png,30\n", "line 3: a second line for image 'a'"),
    (["a.png"], "name,age\nx/a.png,3\ny/a.png,30\n", "line 3: a second line for image 'a'"),
])  # fmt: skip
def test_names_that_two_files_have_are_refused(
    tmp_path: Path, names: list[str], csv: str, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        create(write(tmp_path, names, csv), ".")


def test_files_of_one_name_that_nobody_reads_are_left_alone(tmp_path: Path) -> None:
    names = ["image/a.png", "preview/a.png", "preview/a.jpg", "logo.png", "logo.jpg"]
    reader = create(write(tmp_path, names), ".")
    assert len(reader) == 1 and reader.twice["preview"] == ("preview/a.jpg", "preview/a.png")


def test_a_table_as_excel_writes_it_is_read(tmp_path: Path) -> None:
    reader = create(write(tmp_path, ["a.png"], "\ufeffname,age\na.png,3\n"), ".")
    assert reader[0].labels["age"] == 3


def test_a_readers_own_fault_is_told_as_its_own() -> None:
    """Third parties write readers; what these raise is no fault of the program."""

    class Faulty(Stored):
        def __getitem__(self, index: int) -> Sample:
            raise ZeroDivisionError("no pixels")

    with pytest.raises(DataError, match=r"Faulty failed on its sample 3: ZeroDivisionError"):
        InMemory(Faulty([mask(0)] * 4))[3]


def test_a_third_partys_module_that_cannot_be_imported_is_told(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "their_reader.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "entries", lambda _package: {"theirs": "their_reader"})
    with pytest.raises(RuntimeMissing, match=r"cannot be imported from their_reader.*no_such_lib"):
        open_reader("theirs", tmp_path, "train")


def damaged_zip(path: Path) -> Path:
    """A zip whose member is compressed, and does not unpack any more."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1000))
        start = archive.infolist()[0].header_offset
    data = bytearray(path.read_bytes())
    data[start + 30 + len("a.png") : start + 30 + len("a.png") + 4] = b"\xff" * 4
    path.write_bytes(data)
    return path


def test_a_damaged_member_of_a_zip_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read a\.png in"):
        ImageArchive(damaged_zip(tmp_path / "data.zip")).read("a.png")


def test_images_to_judge_by_are_not_those_to_learn_from(tmp_path: Path) -> None:
    """Twenty of each; told by what is in a file, not by its name."""

    def images(split: str, grey: range) -> InMemory:
        (tmp_path / split).mkdir()
        for number, value in enumerate(grey):
            cv2.imwrite(str(tmp_path / split / f"{split}{number}.png"), IMAGE + np.uint8(value))
        return InMemory(create(tmp_path, split))

    train = images("train", range(20))
    _check_apart(train, images("apart", range(20, 40)))
    _check_apart(train, images("two", range(18, 38)))  # which may be chance
    with pytest.raises(DataError, match=r"3 of the 20 images of data\.eval .* first 'three0\.png'"):
        _check_apart(train, images("three", range(17, 37)))
