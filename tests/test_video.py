"""A video through a bundle and its parent: what is read, drawn, timed and recorded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from cli_run import run
from conftest import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from secateur.bench.board import ACCENTS, OPACITY, Board, Readout, Side, speed, spoken
from secateur.bench.clips import due, open_clip, recording
from secateur.bench.colours import class_picture, depth_picture
from secateur.bench.layout import arrange, extent
from secateur.bench.legend import Shown, entries_of, flow
from secateur.bench.lettering import DIM, fitted, text
from secateur.bundle.runner import Runner
from secateur.core.errors import BundleError, DataError
from secateur.core.task import Task
from secateur.data.loading import class_names, open_reader
from secateur.flow.cache import StageCache
from secateur.flow.video import clock, show_video

SMALL = (640, 360)  # boards of tests
SEGMENTATION = Shown(Task("segmentation", "s", "segmentation", "s", 3), ("floor", "wall", "box"))
DEPTH = Shown(Task("depth", "d", "depth", "d"))
NORMALS = Shown(Task("normals", "n", "normals", "n"))
ROOM = Shown(Task("room", "r", "classification", "r", 2), ("office", "bathroom"))
CORNERS = Shown(Task("corners", "c", "keypoints", "c"))


def frames_of_rooms(count: int) -> list[np.ndarray]:
    """Photographs of NYUv2 where they are at hand, else rendered rooms."""
    root = DATA / "nyuv2_mini"
    reader = (
        open_reader("nyuv2", root, "test")
        if root.exists()
        else open_reader("scenes", None, "test", count=count, height=96, width=128)
    )
    return [cv2.resize(reader[i % len(reader)].image, (128, 96)) for i in range(count)]


def write_clip(path: Path, frames: list[np.ndarray], fps: float = 10) -> Path:
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
    writer.release()
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "rooms.mp4", frames_of_rooms(8))


def read_all(path: Path) -> list[np.ndarray]:
    with open_clip(str(path)) as clip:
        return list(clip)


def board_of(*tasks: Shown, size: tuple[int, int] = (96, 128), sides: int = 2) -> Board:
    models = [Side(f"model {i}", "1 MB", ACCENTS[i]) for i in range(sides)]
    return Board("rooms", "a test", models, tasks, size, SMALL)


# Layout


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 9),
    st.tuples(st.integers(300, 1900), st.integers(300, 1000)),
    st.floats(0.4, 2.4),
    st.integers(0, 12),
)
def test_panels_stay_in_their_room_and_off_each_other(
    count: int, room: tuple[int, int], aspect: float, gap: int
) -> None:
    boxes = arrange(count, room, aspect, gap)
    width, height = extent(boxes)
    assert len(boxes) == count
    narrow = min(b.width for b in boxes)
    if narrow > 40:  # else the smallest readable width counts for more than the room
        assert width <= room[0] + 1 and height <= room[1] + count
    for a, b in combinations(boxes, 2):
        assert (
            a.x + a.width + gap <= b.x
            or b.x + b.width + gap <= a.x
            or a.y + a.height + gap <= b.y
            or b.y + b.height + gap <= a.y
        )
    assert all(abs(b.width / b.height / aspect - 1) < 0.1 for b in boxes if b.height > 20)


def test_two_wide_panels_stand_below_each_other_and_three_have_a_large_one() -> None:
    two = arrange(2, (900, 800), 4 / 3, 10)
    assert two[0].x == two[1].x and two[0].y < two[1].y
    three = arrange(3, (900, 800), 4 / 3, 10)
    assert three[0].width > 1.9 * three[1].width and three[1].y == three[2].y


@pytest.mark.parametrize("size", [(96, 128), (1080, 1920), (1280, 720), (33, 47)])
def test_a_board_has_even_sides_within_its_limit(size: tuple[int, int]) -> None:
    board = board_of(SEGMENTATION, DEPTH, NORMALS, ROOM, size=size)
    height, width = board.shape
    assert height % 2 == 0 and width % 2 == 0
    assert height <= SMALL[1] + 1 and width <= SMALL[0] + 1


def test_a_legend_names_what_fits_and_counts_the_rest() -> None:
    many = Shown(Task("s", "s", "segmentation", "s", 60), tuple(f"class {i}" for i in range(60)))
    entries = entries_of([many, DEPTH], round)
    assert entries[0].depth == "depth"  # metres are never among the rest
    for width, rows in ((900, 2), (400, 1), (100, 3)):
        placed, complete = flow(entries, (width, rows), round)
        shown = (len(placed) - 1) // 2  # two sprites each, and the words at the end
        assert not complete and max(each.row for each in placed) == rows - 1
        assert placed[-1].sprite is text(f"and {61 - shown} more", 16, DIM)
        if width > 400:
            assert all(each.x + each.sprite.width <= width for each in placed)
    placed, complete = flow(entries, (9000, 1), round)
    assert complete and len(placed) == 2 * 61


def test_long_words_end_within_their_room() -> None:
    whole = text("segmentation", 20, DIM)
    assert np.array_equal(fitted("segmentation", 20, DIM, 1000).cover, whole.cover)
    assert fitted("segmentation, depth, normals", 20, DIM, 120).width <= 120


# What is drawn


def answers_for(board: Board, label: int, metres: float) -> dict[str, np.ndarray]:
    seg, depth = board.size_of("segmentation"), board.size_of("depth")
    assert seg and depth
    slope = np.linspace(metres, 2 * metres, depth[0] * depth[1], dtype=np.float32)
    return {
        "segmentation": np.full(seg, label, np.uint8),
        "depth": slope.reshape(*depth, 1),
        "room": np.array([0.1, 0.9], np.float32),
    }


def panel(board: Board, picture: np.ndarray, side: int, number: int) -> np.ndarray:
    box = board.boxes[number].moved(board._side_x(side), board.top)
    return picture[box.y : box.y + box.height, box.x : box.x + box.width]


def test_each_side_shows_its_own_answers_in_the_colours_of_the_legend() -> None:
    board = board_of(SEGMENTATION, DEPTH, ROOM)
    frame = np.full((96, 128, 3), 100, np.uint8)
    answers = [answers_for(board, 0, 1.0), answers_for(board, 2, 1.5)]
    picture = board.draw(frame, answers, [None, None])
    middle = (slice(60, -60), slice(60, -60))  # away from the words
    for side, label in ((0, 0), (1, 2)):
        shown = panel(board, picture, side, 0)[middle].reshape(-1, 3)
        colour = class_picture(np.array([[label]]), 3, 255)[0, 0]
        expected = OPACITY * colour + (1 - OPACITY) * 100
        assert np.abs(shown - expected).max() <= 1
    span = board.depths["depth"]  # of the first side, and used for both
    for side in (0, 1):
        metres = answers[side]["depth"][:, :, 0]
        shown = panel(board, picture, side, 1)
        assert np.array_equal(shown[40:], depth_picture(metres, span.low, span.high)[40:])
    assert 1.0 <= span.low < span.high <= 2.0


def test_a_task_that_one_model_lacks_is_left_empty_there_only() -> None:
    board = board_of(SEGMENTATION, DEPTH)
    whole = answers_for(board, 1, 1.0)
    lacking = {name: value for name, value in whole.items() if name != "depth"}
    picture = board.draw(np.zeros((96, 128, 3), np.uint8), [lacking, whole], [None, None])
    left, right = panel(board, picture, 0, 1), panel(board, picture, 1, 1)
    assert len(np.unique(left[-20:].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(right[-20:].reshape(-1, 3), axis=0)) > 3


def test_points_are_drawn_where_they_are_and_points_that_are_not_are_not() -> None:
    board = board_of(CORNERS, sides=1)
    frame = np.zeros((96, 128, 3), np.uint8)
    points = np.array([0.25, 0.75, np.nan, np.nan, 3.0, 0.5], np.float32)
    with_points = panel(board, board.draw(frame, [{"corners": points}], [None]), 0, 0)
    without = panel(board, board.draw(frame, [{}], [None]), 0, 0)
    y, x = np.nonzero((with_points != without).any(axis=2))
    height, width = without.shape[:2]
    assert abs(x.mean() / width - 0.25) < 0.02 and abs(y.mean() / height - 0.75) < 0.02
    assert np.ptp(x) < 20


def test_latencies_appear_with_the_first_figures_and_only_on_their_side() -> None:
    board = board_of(DEPTH)
    frame = np.zeros((96, 128, 3), np.uint8)
    answers = [{}, {}]
    before = board.draw(frame, answers, [None, None])
    after = board.draw(frame, answers, [None, Readout(12.3, 80.0)])
    changed = np.nonzero((before != after).any(axis=(0, 2)))[0]
    assert changed.size and changed.min() >= board._side_x(1)


def test_depth_that_is_not_a_number_costs_no_frame() -> None:
    board = board_of(DEPTH, sides=1)
    size = board.size_of("depth")
    picture = board.draw(
        np.zeros((96, 128, 3), np.uint8), [{"depth": np.full((*size, 1), np.nan)}], [None]
    )
    assert picture.shape == (*board.shape, 3)


def test_answers_that_are_no_maps_are_said_in_words() -> None:
    assert spoken(ROOM, np.array([0.2, 0.8])) == "room: bathroom  80 %"
    unnamed = Shown(Task("room", "r", "classification", "r", 2))
    assert spoken(unnamed, np.array([0.9, 0.1])) == "room: class 0  90 %"
    labels = Shown(Task("has", "h", "multilabel", "h", 3), ("dog", "cat", "bed"))
    assert spoken(labels, np.array([0.9, 0.1, 0.6])) == "has: dog, bed"
    assert spoken(labels, np.zeros(3)) == "has: none"
    assert spoken(Shown(Task("age", "a", "regression", "a")), np.array([31.24])) == "age: 31.2"


def test_ratios_and_times_in_words() -> None:
    assert speed(1.93) == "1.93× faster"
    assert speed(0.5) == "2.00× slower"
    assert speed(1.01) == "as fast"
    assert clock(4.06) == "0:04.1"
    assert clock(59.97) == "1:00.0"


def test_class_names_are_the_readers_where_the_count_is_the_same() -> None:
    assert class_names("scenes", "room", 4)[2] == "warehouse"
    assert class_names("nyuv2", "segmentation", 13)[4] == "floor"
    assert class_names("nyuv2", "segmentation", 40)[4] == "class 4"
    assert class_names("nobody", "room", 2) == ("class 0", "class 1")


# Reading and recording


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.mp4", None, "there is no video file"),
        ("text.mp4", b"not a video", "cannot be opened"),
        ("empty.mp4", b"", "cannot be opened"),
    ],
)
def test_what_is_no_video_is_said_to_be_none(
    tmp_path: Path, name: str, content: bytes | None, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words), open_clip(str(path)):
        pass
    assert capfd.readouterr().err == ""  # FFmpeg and OpenCV would tell it in their own way


def test_a_camera_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="camera 97 cannot be opened"), open_clip("97"):
        pass
    assert capfd.readouterr().err == ""


def test_a_clip_knows_its_size_pace_and_length(clip: Path) -> None:
    with open_clip(str(clip)) as opened:
        assert (opened.size, opened.fps, opened.frames) == ((96, 128), 10, 8)
        assert not opened.live
        assert len(list(opened)) == 8


@given(st.lists(st.floats(0.001, 0.5), min_size=1, max_size=60), st.sampled_from([10.0, 30.0]))
def test_a_live_recording_is_as_long_as_what_it_shows(gaps: list[float], fps: float) -> None:
    seconds, written = 0.0, 0
    for gap in gaps:
        seconds += gap
        written += due(seconds, fps, written)
    assert abs(written / fps - seconds) <= 1 / fps + 1e-6


def test_a_recording_appears_when_it_is_complete_or_not_at_all(tmp_path: Path) -> None:
    out, frame = tmp_path / "a.mp4", np.zeros((64, 96, 3), np.uint8)
    with recording(out, (64, 96), 10) as recorder:
        recorder.add(frame)
        assert not out.exists()
        recorder.add(frame)
    assert len(read_all(out)) == 2
    with pytest.raises(BundleError, match="no frame"), recording(tmp_path / "b.mp4", (64, 96), 10):
        pass
    with pytest.raises(BundleError, match=r"\.mp4"), recording(tmp_path / "c.avi", (64, 96), 10):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


# The whole way


def test_a_bundle_and_its_parent_on_a_real_clip(
    bundle: Path, project: Path, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "demo.mp4"
    result = show_video(
        bundle, str(clip), out, against=project / "recipe.yaml", limit=SMALL,
        cache=StageCache(project / "cache"),
    )  # fmt: skip
    recorded = read_all(out)
    assert result.frames == len(recorded) == 8
    assert recorded[0].shape[:2] == result.size
    assert [side.title for side in result.sides] == ["parent", "cut"]
    assert result.notes == () and not result.stopped
    for side in result.sides:
        assert 0 < side.p50_ms <= side.p90_ms
        assert side.frames_per_second <= 1000 / side.p50_ms

    # What is on the recording is what the bundle's own runner answers.
    frame, number = read_all(clip)[5], 5
    runner = Runner(bundle)
    tasks = [Task(t["name"], t["name"], t["kind"], t["name"], t["classes"]) for t in runner.tasks]
    names = class_names("scenes", "segmentation", 8)
    board = board_of(*(Shown(t, names if t.kind == "segmentation" else ()) for t in tasks))
    size = board.size_of("segmentation")
    labels = runner.decode(runner.predict(frame), size)["segmentation"]
    resized = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)
    wanted = OPACITY * class_picture(labels, 8, 255) + (1 - OPACITY) * resized
    shown = [panel(board, recorded[number], side, 0).astype(float) for side in (0, 1)]
    off = [np.abs(s - wanted)[30:].mean() for s in shown]
    assert off[1] < 6 < off[0]  # the encoder loses some; the parent answers otherwise


def test_the_command_records_and_tells(
    bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.mp4"
    code, printed, _ = run(capsys, "demo", bundle, "--video", clip, "--out", out, "--frames", "3",
                           "--against", bundle, "--json")  # fmt: skip
    result = json.loads(printed)
    assert code == 0
    assert result["frames"] == 3 == len(read_all(out))
    assert [side["title"] for side in result["sides"]] == [f"{tmp_path.name}/bundle", "cut"]


def test_without_its_parent_a_bundle_is_shown_alone_and_it_is_said(
    bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.mp4"  # the parent's checkpoint lies beside the recipe, not the bundle
    code, printed, _ = run(capsys, "demo", bundle, "--video", clip, "--out", out, "--frames", "2")
    assert code == 0
    assert "the parent is not shown" in printed and "--against" in printed
    assert len(read_all(out)) == 2


def test_a_bundle_has_no_code_called_that_it_names(
    bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["recipe"] = manifest["recipe"].replace(
        "factory: tinyproject:make\n", f"factory: os:mkdir\n  arguments: {{path: {made}}}\n"
    )
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    code, printed, _ = run(capsys, "demo", bundle, "--video", clip, "--frames", "2",
                           "--out", tmp_path / "demo.mp4")  # fmt: skip
    assert code == 0 and not made.exists()
    assert "no bundle may say which code is run here" in " ".join(printed.split())

    manifest["recipe"] = manifest["recipe"].replace("os:mkdir", "secateur.zoo:mkdir")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (bundle / "secateur.zoo.py").write_text("from os import mkdir\n")  # not what that name means
    code, printed, _ = run(capsys, "demo", bundle, "--video", clip, "--frames", "2",
                           "--out", tmp_path / "demo.mp4")  # fmt: skip
    assert code == 0 and not made.exists() and "the parent is not shown" in printed


def with_dimensions(path: Path, model: Path, **sizes: int) -> Path:
    """Write an ONNX file that says its image has other sizes."""
    loaded = onnx.load(model)
    dims = loaded.graph.input[0].type.tensor_type.shape.dim
    for index, name in ((2, "height"), (3, "width")):
        dims[index].dim_value = sizes.get(name, dims[index].dim_value)
    onnx.save(loaded, path)
    return path


def test_what_does_not_fit_beside_a_bundle_is_refused(
    bundle: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["tasks"][0]["kind"] = "edges"
    (other / "manifest.json").write_text(json.dumps(manifest))
    foreign = onnx.load(bundle / "model.onnx")
    for output in foreign.graph.output:
        for node in foreign.graph.node:
            node.output[:] = [f"{o}_b" if o == output.name else o for o in node.output]
            node.input[:] = [f"{i}_b" if i == output.name else i for i in node.input]
        output.name += "_b"
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    cases = [
        (with_dimensions(tmp_path / "tall.onnx", bundle / "model.onnx", height=64), "(3, 64, 48)"),
        (tmp_path / "foreign.onnx", "none of the bundle's tasks"),
        (tmp_path / "text.onnx", "no ONNX file"),
        (tmp_path / "absent", "there is no"),
        (other, "is edges of 8 classes"),
    ]
    for against, words in cases:
        code, _, err = run(capsys, "demo", bundle, "--video", clip, "--against", against,
                           "--out", tmp_path / "x.mp4")  # fmt: skip
        assert code == 2, against
        assert words in " ".join(err.split()), err
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--video", "clip.mp4"], "needs a bundle"),
        (["some/bundle"], "is for --video only"),
        (["--frames", "3"], "is for --video only"),
        (["some/bundle", "--video", "absent.mp4"], "there is no video file absent.mp4"),
    ],
)
def test_wrong_commands(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "demo", *arguments)
    assert code == 2 and words in " ".join(err.split())


def test_ctrl_c_ends_the_recording_properly(bundle: Path, tmp_path: Path) -> None:
    long = write_clip(tmp_path / "long.mp4", frames_of_rooms(8) * 200)
    out = tmp_path / "out.mp4"
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur", "demo", bundle, "--video", long, "--out", out,
         "--against", bundle, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if any(path.stat().st_size > 5000 for path in tmp_path.glob(".out.mp4.tmp-*")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(printed)
    assert result["stopped"] and 0 < result["frames"] < 1600
    assert len(read_all(out)) == result["frames"]
