"""Frames from a video file or a camera, and an mp4 that keeps their pace (OpenCV)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from secateur.core.errors import BundleError, DataError
from secateur.core.files import atomic_path

Picture = NDArray[np.uint8]
USUAL_FPS = 30.0
CODEC = "mp4v"  # MPEG-4 part 2: the one that every build of OpenCV can write


@dataclass
class Clip:
    """An open video: its first frame is read, so that there is one.

    ``frames`` is None where the file does not say (a camera never does).
    """

    name: str
    live: bool
    fps: float
    frames: int | None
    size: tuple[int, int]
    _capture: cv2.VideoCapture
    _first: Picture

    def __iter__(self) -> Iterator[Picture]:
        """Yield (h, w, 3) uint8 RGB frames until there are no more."""
        yield self._first
        while True:
            found, frame = self._capture.read()
            if not found:
                return
            yield _rgb(frame)


@contextmanager
def open_clip(source: str) -> Iterator[Clip]:
    """Open a video file, or the camera of a number such as ``0``.

    Raises:
        DataError: there is no such file or camera, it is no video, or it has no frames.
    """
    live = source.isdigit() and not Path(source).exists()
    if not live and not Path(source).is_file():
        raise DataError(
            f"there is no video file {source}", hint="give a file, or a camera's number such as 0"
        )
    with _quiet():
        capture = cv2.VideoCapture(int(source) if live else source)
        try:
            if live:
                capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # show what is now, not what waited
            if not capture.isOpened():
                raise _unreadable(source, live, "cannot be opened")
            found, frame = capture.read()
            if not found:
                raise _unreadable(source, live, "has no frames that OpenCV can read")
            first = _rgb(frame)
            yield Clip(
                name=f"camera {source}" if live else Path(source).name,
                live=live,
                fps=_sane_fps(capture.get(cv2.CAP_PROP_FPS)),
                frames=None if live else _count(capture.get(cv2.CAP_PROP_FRAME_COUNT)),
                size=(first.shape[0], first.shape[1]),
                _capture=capture,
                _first=first,
            )
        finally:
            capture.release()


class Recorder:
    """Writes RGB frames; a live recording repeats or drops frames so that its clock is right."""

    def __init__(self, writer: cv2.VideoWriter, fps: float) -> None:
        self._writer, self._fps = writer, fps
        self.written = 0

    def add(self, frame: Picture, seconds: float | None = None) -> None:
        """Write a frame; ``seconds`` since the start, for a live recording."""
        copies = 1 if seconds is None else due(seconds, self._fps, self.written)
        bgr = np.ascontiguousarray(frame[:, :, ::-1])
        for _ in range(copies):
            self._writer.write(bgr)
        self.written += copies


def due(seconds: float, fps: float, written: int) -> int:
    """Return how often a frame of that time is written, so that ``fps`` frames make a second."""
    return max(0, math.floor(seconds * fps) + 1 - written)


@contextmanager
def recording(path: Path, size: tuple[int, int], fps: float) -> Iterator[Recorder]:
    """Record an mp4 of (height, width) frames; it appears under its name when it is complete.

    Raises:
        BundleError: it cannot be written, is not called ``.mp4``, or got no frame.
    """
    if path.suffix.lower() != ".mp4":
        raise BundleError(f"a video is written as .mp4, not as {path.name}", hint="name it so")
    with atomic_path(path) as temporary, _quiet():
        code = cv2.VideoWriter.fourcc(*CODEC)
        writer = cv2.VideoWriter(str(temporary), code, fps, size[::-1])
        if not writer.isOpened():
            raise BundleError(
                f"cannot write {path}: this OpenCV has no encoder for mp4",
                hint="pip install --force-reinstall opencv-python-headless",
            )
        recorder = Recorder(writer, fps)
        try:
            yield recorder
        finally:
            writer.release()  # writes the index, without which no player opens the file
        if not recorder.written:
            raise BundleError(f"no frame was recorded, so there is no {path}", hint="run it again")


class Window:
    """A window on the screen, where this OpenCV has any and there is a screen."""

    def __init__(self, title: str) -> None:
        self._title = title
        self.shown = can_show()

    def show(self, frame: Picture) -> bool:
        """Show an RGB frame; return False when the user closed it with q or Esc."""
        if not self.shown:
            return True
        cv2.imshow(self._title, np.ascontiguousarray(frame[:, :, ::-1]))
        return (cv2.waitKey(1) & 0xFF) not in (ord("q"), 27)

    def close(self) -> None:
        """Take the window off the screen."""
        if self.shown:
            cv2.destroyAllWindows()


def can_show() -> bool:
    """Whether this OpenCV has windows (the headless one has none) and there is a screen."""
    built = [line.split() for line in cv2.getBuildInformation().splitlines() if "GUI:" in line]
    has_windows = any(words[1:] and words[1] != "NONE" for words in built)
    desktop = sys.platform in ("win32", "darwin")
    return has_windows and (desktop or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()))


def _rgb(frame: NDArray[np.generic]) -> Picture:
    return np.ascontiguousarray(np.asarray(frame, np.uint8)[:, :, ::-1])


def _sane_fps(fps: float) -> float:
    return fps if 1 <= fps <= 240 else USUAL_FPS  # NaN, 0 and 90000 have been seen


def _count(frames: float) -> int | None:
    return int(frames) if 0 < frames < 1e9 else None


def _unreadable(source: str, live: bool, what: str) -> DataError:
    if live:
        return DataError(
            f"camera {source} {what}",
            hint="see which there are with `ls /dev/video*`; another program may be using it",
        )
    return DataError(
        f"{source} {what}", hint="give a video file, or convert it: ffmpeg -i FILE clip.mp4"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep OpenCV's and FFmpeg's own lines off the terminal: what matters becomes an error."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)
