"""Readers and transforms: real files where they are at hand, and what must hold of any sample."""

from __future__ import annotations

from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from conftest import SPEC, need_data
from secateur.core.errors import DataError
from secateur.core.model import ModelInput
from secateur.core.task import Task
from secateur.data.loading import InMemory, batches, has_labels, open_reader, spread
from secateur.data.nyuv2 import unit_normals
from secateur.data.sample import Sample
from secateur.data.scenes import CLASSES, ROOMS
from secateur.data.transforms import Augment, View, draw_view, image_tensor, target_tensor

DEPTH = Task("depth", "depth", "depth", "depth")
NORMALS = Task("normals", "normals", "normals", "normals")
SEGMENTATION = Task("seg", "seg", "segmentation", "segmentation", classes=8)


def test_scenes_are_the_same_whatever_was_read_before() -> None:
    first = open_reader("scenes", None, "train", count=5)
    second = open_reader("scenes", None, "train", count=9)
    _ = second[3], second[0]
    assert np.array_equal(first[4].image, second[4].image)
    assert not np.array_equal(open_reader("scenes", None, "test")[4].image, first[4].image)


def test_scenes_labels_agree_with_geometry() -> None:
    reader = open_reader("scenes", None, "train", count=40)
    classes, rooms = set(), set()
    for i in range(len(reader)):
        labels = reader[i].labels
        classes |= set(np.unique(labels["segmentation"]).tolist())
        rooms.add(int(labels["room"]))
        assert np.allclose(np.linalg.norm(labels["normals"], axis=2), 1, atol=1e-3)
        assert (labels["depth"] > 0.1).all() and (labels["depth"] < 15).all()
        floor = labels["segmentation"] == CLASSES.index("floor")
        if floor.sum() > 200:  # the floor faces up (y points down), whatever the camera's pitch
            assert labels["normals"][floor][:, 1].mean() < -0.9
    assert classes == set(range(len(CLASSES))) and rooms == set(range(len(ROOMS)))


def test_depth_gives_the_normals_of_a_wall() -> None:
    """Neighbouring points of a flat surface lie in the plane its normal says."""
    sample = open_reader("scenes", None, "test", count=1, height=192, width=256)[0]
    depth, normals = sample.labels["depth"], sample.labels["normals"]
    flat = (np.abs(normals[1:-1, 1:-1] - normals[1:-1, 2:]).max(2) < 1e-6) & (
        np.abs(normals[1:-1, 1:-1] - normals[2:, 1:-1]).max(2) < 1e-6
    )
    assert flat.mean() > 0.5
    y, x = np.nonzero(flat)
    n = normals[y + 1, x + 1]
    facing = n[:, 2] < 0
    assert facing.mean() > 0.5 and (depth[y + 1, x + 1] > 0).all()


def test_mirroring_turns_labels_with_the_image() -> None:
    sample = open_reader("scenes", None, "train", count=1)[0]
    spec = ModelInput(3, 96, 128, (0, 0, 0), (1, 1, 1))
    view = View(mirror=True)
    assert torch.equal(
        image_tensor(sample.image, spec, view), image_tensor(sample.image, spec).flip(2)
    )
    plain, turned = (target_tensor(sample, NORMALS, spec, v) for v in (None, view))
    assert torch.equal(turned[0], -plain[0].flip(1)) and torch.equal(turned[1:], plain[1:].flip(2))
    plain, turned = (target_tensor(sample, DEPTH, spec, v) for v in (None, view))
    assert torch.equal(turned, plain.flip(1))


def test_zooming_brings_the_depth_nearer() -> None:
    sample = Sample("x", np.zeros((40, 60, 3), np.uint8), {"depth": np.full((40, 60), 6.0)})
    assert target_tensor(sample, DEPTH, SPEC, View(zoom=1.5)).unique().tolist() == [4.0]


def test_keypoints_move_with_the_view_and_leave_when_outside() -> None:
    task = Task("head", "head", "keypoints", "head")
    sample = Sample(
        "x", np.zeros((8, 8, 3), np.uint8), {"head": np.array([[0.5, 0.5], [0.1, 0.1]])}
    )
    moved = target_tensor(sample, task, SPEC, View(x=0.25, y=0.25, zoom=2.0, mirror=True))
    assert moved[0].tolist() == [0.5, 0.5] and torch.isnan(moved[1]).all()


def test_views_stay_inside_the_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        view = draw_view(Augment(scale=2.0), rng)
        assert view.x >= 0 and view.x + 1 / view.zoom <= 1 + 1e-9
        assert view.y >= 0 and view.y + 1 / view.zoom <= 1 + 1e-9


def test_shuffled_batches_depend_on_the_seed_only() -> None:
    reader = InMemory(open_reader("scenes", None, "train", count=10, height=32, width=48))

    def ids(seed):
        stream = batches(reader, [DEPTH], SPEC, 4, augment=Augment(), shuffle_seed=seed)
        return [(batch.ids, float(batch.images.sum())) for batch in stream]

    assert ids(1) == ids(1) != ids(2)
    assert sorted(i for batch, _ in ids(1) for i in batch) == [reader[i].id for i in range(10)]


def test_a_last_batch_of_one_is_not_trained_on() -> None:
    reader = open_reader("scenes", None, "train", count=9, height=32, width=48)
    sizes = [len(b.ids) for b in batches(reader, [], SPEC, 4, shuffle_seed=0)]
    assert sizes == [4, 4]
    assert [len(b.ids) for b in batches(reader, [], SPEC, 4)] == [4, 4, 1]


def test_spread_is_even_and_ends_at_the_ends() -> None:
    reader = open_reader("scenes", None, "train", count=101)
    assert spread(reader, 5) == [0, 25, 50, 75, 100]
    assert spread(reader, 1000) == list(range(101))


def write_folder(root: Path) -> None:
    for name in ("image", "segmentation", "depth", "normals"):
        (root / name).mkdir(parents=True)
    for i in range(3):
        cv2.imwrite(str(root / f"image/{i}.png"), np.full((6, 8, 3), (10, 20, 30 * i), np.uint8))
        cv2.imwrite(str(root / f"segmentation/{i}.png"), np.full((6, 8), i, np.uint8))
        cv2.imwrite(str(root / f"depth/{i}.png"), np.full((6, 8), 2500, np.uint16))
        cv2.imwrite(str(root / f"normals/{i}.png"), np.full((6, 8, 3), (255, 128, 128), np.uint8))
    (root / "labels.csv").write_text("name,age\n0.png,30\n1.png,41.5\n2.png,7\n")


def test_a_folder_of_ones_own_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    reader = open_reader("folder", tmp_path, "train")
    sample = reader[2]
    assert reader.label_names == {"segmentation", "depth", "normals", "age"}
    assert sample.image[0, 0].tolist() == [60, 20, 10]  # RGB
    assert sample.labels["depth"][0, 0] == pytest.approx(2.5)
    assert sample.labels["normals"][0, 0] == pytest.approx([0, 0, 1], abs=0.01)
    assert float(sample.labels["age"]) == 7
    assert has_labels(reader, [SEGMENTATION, DEPTH])


def test_a_table_of_labels_without_names_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    (tmp_path / "train/labels.csv").write_text("file,age\n0.png,30\n")
    with pytest.raises(DataError, match="has no column 'name'; its first line is 'file,age'"):
        open_reader("folder", tmp_path, "train")


def test_an_empty_image_is_told(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    (tmp_path / "train/image/1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot decode image image/1\.png"):
        open_reader("folder", tmp_path, "train")[1]


def test_a_folder_with_a_gap_in_its_labels_names_the_gap(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    (tmp_path / "train/depth/1.png").unlink()
    with pytest.raises(DataError, match=r"label 'depth' .* lacks 1 of 3 images, first '1'"):
        open_reader("folder", tmp_path, "train")


def test_a_damaged_zip_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.zip").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="is not a zip"):
        open_reader("nyuv2", tmp_path, "train")


def test_the_official_nyuv2_file_layout(tmp_path: Path) -> None:
    """The .mat is HDF5 with axes reversed: images (N, 3, W, H), depths and labels (N, W, H)."""
    path = tmp_path / "nyu_depth_v2_labeled.mat"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 8, 6), np.uint8)
    labels = np.zeros((3, 8, 6), np.uint16)
    labels[:, 2:] = 500
    labels[:, 7:] = 21
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images, labels
        file["depths"] = np.full((3, 8, 6), 1.5, np.float32)
    reader = open_reader("nyuv2", path, "test", indices=[2, 3])
    sample = reader[0]
    assert len(reader) == 2 and sample.id == "0002" and sample.image.shape == (6, 8, 3)
    assert sample.image[4, 5].tolist() == images[1, :, 5, 4].tolist()
    assert sample.labels["segmentation"][0].tolist() == [255, 255, 0, 0, 0, 0, 0, 1]
    with pytest.raises(DataError, match=r"indices are 1-based|images 1..3"):
        open_reader("nyuv2", path, "test", indices=[4])


def test_nyuv2_mini_as_stored() -> None:
    reader = open_reader("nyuv2", need_data("nyuv2_mini"), "train")
    sample = reader[0]
    assert len(reader) == 96 and sample.image.shape == (96, 128, 3)
    assert sample.labels["depth"].min() > 0.7 and sample.labels["depth"].max() < 10
    assert np.allclose(np.linalg.norm(sample.labels["normals"], axis=2), 1, atol=1e-3)
    assert set(np.unique(sample.labels["segmentation"])) <= {*range(13), 255}


def test_pets_and_cifar_as_stored() -> None:
    pets = open_reader("pets", need_data("pets3"), "train")
    assert len(pets) == 300 and pets[0].labels["head"].shape == (2, 2)
    ids = {split: {s.id for s in open_reader("pets", need_data("pets3"), split)}
           for split in ("train", "fit", "val", "test")}  # fmt: skip
    assert ids["fit"] | ids["val"] == ids["train"] and len(ids["val"]) == 50
    assert not ids["fit"] & ids["val"] and not ids["train"] & ids["test"]
    cifar = open_reader("cifar100", need_data("cifar100_sub"), "test", fine=[3, 42])
    assert len(cifar) == 200 and int(cifar[150].labels["fine"]) == 1
    assert cifar[0].image.shape == (32, 32, 3)


def test_cifar_of_coarse_classes() -> None:
    root = need_data("cifar100_sub")
    reader = open_reader("cifar100", root, "test", coarse=[3])
    assert len(reader) == 500
    assert {int(reader[n].labels["coarse"]) for n in range(0, 500, 50)} == {3}
    assert [int(reader[n].labels["fine"]) for n in (0, 100, 499)] == [0, 1, 4]
    with pytest.raises(DataError, match="there is no coarse class 20"):
        open_reader("cifar100", root, "test", coarse=[3, 20])
    with pytest.raises(DataError, match="both given"):
        open_reader("cifar100", root, "test", coarse=[3], fine=[1])


def test_a_stored_normal_that_is_none_is_zero() -> None:
    stored = np.full((2, 3, 3), 127, np.uint8)
    stored[0, 1] = 128, 128, 128
    stored[0, 2] = 0
    stored[1] = np.rint((np.array([0.6, 0.0, -0.8]) + 1) * 127.5)
    found = unit_normals(stored)
    assert not found[0].any()
    np.testing.assert_allclose(found[1], [[0.6, 0.0, -0.8]] * 3, atol=0.01)
    for wrong in (stored.astype(np.uint16), np.zeros((2, 3, 4), np.uint8), stored[..., 0]):
        with pytest.raises(DataError, match="expected uint8"):
            unit_normals(wrong)


@pytest.mark.parametrize(
    ("kind", "label"),
    [("classification", np.zeros(3, np.int64)), ("multilabel", np.float32(1)),
     ("multilabel", np.zeros(3, np.float32)), ("keypoints", np.zeros(6, np.float32)),
     ("keypoints", np.float32(1))],
)  # fmt: skip
def test_a_label_of_another_kind_is_told(kind: str, label: np.ndarray) -> None:
    task = Task("t", "t", kind, "t", classes=None if kind == "keypoints" else 4)
    sample = Sample("s7", np.zeros((32, 48, 3), np.uint8), {"t": np.asarray(label)})
    with pytest.raises(DataError, match="label 't' of sample s7 has shape"):
        target_tensor(sample, task, SPEC)


def test_edges_keep_what_is_unknown() -> None:
    label = np.resize(np.array([1, 255], np.uint8), (SPEC.height, SPEC.width))
    sample = Sample("s8", np.zeros((32, 48, 3), np.uint8), {"t": label})
    found = target_tensor(sample, Task("t", "t", "edges", "t"), SPEC)
    assert set(found.unique().tolist()) == {1, 255}
