"""A video through a bundle and its parent, side by side, with their latencies as they run."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.bench.board import ACCENTS, FULL_HD, Board, Readout, Side
from secateur.bench.clips import Clip, Picture, Recorder, Window, open_clip, recording
from secateur.bench.legend import Shown
from secateur.bundle.manifest import Manifest
from secateur.bundle.runner import decode, preprocess
from secateur.core.errors import RecipeError
from secateur.core.progress import track
from secateur.core.task import Task
from secateur.data.loading import class_names
from secateur.devices.host import host_facts
from secateur.flow.cache import StageCache
from secateur.flow.recipe import parse_recipe
from secateur.flow.sides import Model, open_pair

LATELY = 60  # frames that the figures on the screen are of
ENOUGH = 5  # before anything is said
WARM_UP = 3  # runs that are thrown away

Answers = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Spent:
    """Milliseconds of each frame: the runtime's call alone, and from resizing to the outputs."""

    call: MutableSequence[float]
    whole: MutableSequence[float]

    def readout(self) -> Readout:
        """Return the median of the calls, and the frames per second that the whole allows."""
        return Readout(float(np.median(self.call)), 1000 / float(np.median(self.whole)))


@dataclass(frozen=True)
class SideResult:
    """What a side took, over all frames."""

    title: str
    runtime: str
    p50_ms: float
    p90_ms: float
    frames_per_second: float


@dataclass(frozen=True)
class VideoResult:
    """``size``: (height, width) of the recording; ``stopped``: before the video's end, by the
    user."""

    out: str
    frames: int
    seconds: float
    size: tuple[int, int]
    threads: int
    sides: tuple[SideResult, ...]
    stopped: bool
    notes: tuple[str, ...]


def show_video(
    folder: Path,
    source: str,
    out: Path,
    *,
    against: Path | None = None,
    most: int | None = None,
    cache: StageCache | None = None,
    limit: tuple[int, int] = FULL_HD,
) -> VideoResult:
    """Run a bundle on a video (a file, or a camera's number) and record it beside its parent.

    ``against``: see ``sides.open_pair``. ``most``: stop after so many frames. ``limit``: the
    largest recording (width, height). Ctrl-C ends the recording properly.

    Raises:
        DataError: there is no such video, or it has no frames.
        BundleError, VerifyError: a bundle is not whole, or the two do not fit together.
    """
    with open_clip(source) as clip:
        manifest, models, notes = open_pair(folder, against, cache or StageCache())
        board = _board(manifest, models, clip, limit)
        with recording(out, board.shape, clip.fps) as recorder:
            screening = Screening(clip, models, board, recorder)
            stopped = screening.run(most)
    return VideoResult(
        out=str(out),
        frames=screening.frames,
        seconds=round(screening.seconds, 2),
        size=board.shape,
        threads=manifest.threads,
        sides=tuple(screening.results()),
        stopped=stopped,
        notes=tuple(notes),
    )


def _board(
    manifest: Manifest, models: Sequence[Model], clip: Clip, limit: tuple[int, int]
) -> Board:
    tasks = _tasks(manifest)
    threads = f"{manifest.threads} thread{'s' if manifest.threads > 1 else ''}"
    words = [clip.name, host_facts()["cpu"], models[-1].runtime, threads]
    sides = [
        Side(model.title, model.detail, accent)
        for model, accent in zip(models, ACCENTS[-len(models) :], strict=True)
    ]
    title = ", ".join(task.name for task in manifest.tasks)
    return Board(title, "  ·  ".join(words), sides, tasks, clip.size, limit)


def _tasks(manifest: Manifest) -> list[Shown]:
    """Return the bundle's tasks, with the names that its data's reader has for their classes."""
    reader, labels = "", dict[str, str]()
    with suppress(RecipeError):  # a recipe may ask for variables that only its author has set
        recipe = parse_recipe(manifest.recipe, Path("recipe.yaml"))
        reader = recipe.data.eval.reader
        labels = {task.name: task.label for task in recipe.all_tasks()}
    return [
        Shown(
            Task(t.name, t.name, t.kind, labels.get(t.name, t.name), t.classes, t.ignore_index),
            class_names(reader, labels.get(t.name, t.name), t.classes),
        )
        for t in manifest.tasks
    ]


@dataclass
class Screening:
    """One run through a clip. ``frames`` were recorded, within ``seconds``."""

    clip: Clip
    models: Sequence[Model]
    board: Board
    recorder: Recorder
    frames: int = 0
    seconds: float = 0.0
    _spent: list[Spent] = field(default_factory=list)
    _lately: list[Spent] = field(default_factory=list)

    def run(self, most: int | None = None) -> bool:
        """Show and record; return whether the user stopped it: Ctrl-C, or q in the window."""
        self._spent = [Spent([], []) for _ in self.models]
        self._lately = [Spent(deque(maxlen=LATELY), deque(maxlen=LATELY)) for _ in self.models]
        known = [count for count in (self.clip.frames, most) if count is not None]
        window = Window(self.board.title)
        start = 0.0
        try:
            with asked_to_stop() as asked:
                for frame in track(
                    islice(iter(self.clip), most), "frames", min(known) if known else None
                ):
                    if not self.frames:
                        self._warm_up(frame)
                        start = time.perf_counter()
                    picture = self._frame(frame)
                    self.seconds = time.perf_counter() - start
                    self.recorder.add(picture, self.seconds if self.clip.live else None)
                    self.frames += 1
                    if not window.show(picture) or asked():
                        return True
        except KeyboardInterrupt:  # the second: a camera that sends nothing more, say
            return True
        finally:
            window.close()
        return False

    def results(self) -> list[SideResult]:
        """Return every side's figures over all frames."""
        found = []
        for model, spent in zip(self.models, self._spent, strict=True):
            readout = spent.readout()
            p90 = float(np.percentile(spent.call, 90))
            found.append(SideResult(model.title, model.runtime, readout.p50_ms, p90, readout.fps))
        return found

    def _warm_up(self, frame: Picture) -> None:
        for model in self.models:
            inputs = preprocess(frame, model.contract)
            for _ in range(WARM_UP):
                model.run(inputs)

    def _frame(self, frame: Picture) -> Picture:
        answers: list[Answers] = [{} for _ in self.models]
        order = range(len(self.models))
        for index in order if self.frames % 2 == 0 else reversed(order):  # none is always first
            answers[index] = self._answers(index, frame)
        said = [each.readout() if len(each.call) >= ENOUGH else None for each in self._lately]
        position = self.seconds if self.clip.live else self.frames / self.clip.fps
        of = len(self._lately[0].call)
        note = f"{clock(position)}  ·  p50 of the last {of} frames"
        return self.board.draw(frame, answers, said, note)

    def _answers(self, index: int, frame: Picture) -> Answers:
        """Run one side, note what it took, and decode what the board shows."""
        model = self.models[index]
        start = time.perf_counter()
        inputs = preprocess(frame, model.contract)
        ready = time.perf_counter()
        outputs = model.run(inputs)
        end = time.perf_counter()
        for spent in (self._spent[index], self._lately[index]):
            spent.call.append(1000 * (end - ready))
            spent.whole.append(1000 * (end - start))
        return self._decoded(outputs)

    def _decoded(self, outputs: Mapping[str, NDArray[np.float32]]) -> Answers:
        found: Answers = {}
        for shown in self.board.tasks:
            name = shown.task.name
            if name in outputs:
                size = self.board.size_of(name) or self.clip.size
                found[name] = decode(outputs[name], {"kind": shown.task.kind}, size)
        return found


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C wait for whoever asks: a frame is recorded and counted, or neither.

    The second one interrupts as usual. Outside the main thread, where Python delivers no signal,
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()

    def note(*_: object) -> None:
        if came.is_set():
            raise KeyboardInterrupt
        came.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def clock(seconds: float) -> str:
    """Return minutes and seconds: 0:04.1."""
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"
