"""Pictures one after the other, or some at once: made, written and told of; one that fails does not stop the others."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from diffengine_sdxl.engine import launch
from diffengine_sdxl.engine.export import versions
from diffengine_sdxl.engine.inference.gallery import Gallery, NoRoomError
from diffengine_sdxl.engine.inference.inferencer import Job, SDXLInferencer
from diffengine_sdxl.engine.inference.request import Request


@dataclass
class Asked:
    """One picture of what was asked for.

    Attributes:
        number: its place among all; broken rows count too, so that files keep their names when these are mended.
        where: words that name its row, in errors.
    """

    number: int
    where: str
    request: Request


@dataclass
class Outcome:
    """What became of it all.

    Attributes:
        made, present: numbers of pictures, and of those that were there already.
        errors: what was not made, and why.
        fault: what ended it before its time, or an error of this program; it is raised when all else is told.
    """

    folder: Path
    made: int = 0
    present: int = 0
    errors: list[str] = field(default_factory=list)
    fault: BaseException | None = None

    def note(self, one: Asked, words: str) -> None:
        """Why `one` was not made; the same of several pictures of a row is said once."""
        message = f'{one.where}: {words}' if one.where else words
        if message not in self.errors:
            self.errors.append(message)


#: A picture to make, its path, and its settings.
Todo = tuple[Asked, Path, dict[str, Any]]


class Making:
    """Makes, writes and tells of each picture. One that fails does not stop the others."""

    def __init__(self, inferencer: SDXLInferencer, gallery: Gallery, outcome: Outcome) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        self.inferencer, self.gallery, self.outcome = inferencer, gallery, outcome
        self.bar = Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            console=Console(stderr=True))
        self.pictures, self.steps = (self.bar.add_task(name, total=None) for name in ('pictures', 'steps'))
        self.over = False

    def make_all(self, todo: Sequence[Todo], batch_size: int) -> None:
        """All of them, `batch_size` at once."""
        self.bar.update(self.pictures, total=len(todo))
        with self.bar, self.inferencer.remembering():
            for begin in range(0, len(todo), batch_size):
                self._make(todo[begin:begin + batch_size])

    def _make(self, some: Sequence[Todo]) -> None:
        left, fault = dict(enumerate(some)), None
        if self.over:
            return
        try:
            for job in self.inferencer.preprocess([one.request for one, *_ in some], len(some)):
                self._job(job, left)
        except Exception as error:
            fault = error
            # Their frames hold on to what lies on the device.
            traceback.clear_frames(fault.__traceback__)
        if fault is None:
            return
        if is_out_of_memory(fault):
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        if len(left) == len(some) == 1 or isinstance(fault, NoRoomError):
            self._note(next(iter(left.values())), fault)
        else:
            # One of several is at fault; which one, they say alone.
            for one in left.values():
                self._make([one])

    def _job(self, job: Job, left: dict[int, Todo]) -> None:
        """Make a job's pictures; each that is written is taken out of `left`."""
        began = time.perf_counter()
        images = self.inferencer.postprocess(list(self.inferencer.forward(
            job, on_step=lambda done, total: self.bar.update(self.steps, completed=done, total=total))))
        seconds = (time.perf_counter() - began) / len(images)
        made = {'versions': versions(), 'device': str(self.inferencer.device), 'seconds': round(seconds, 3),
                'batch_size': len(images), 'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
        for i, image in zip(job.indices, images, strict=True):
            _, path, settings = left[i]
            try:
                self.gallery.add(path, image, {**settings, 'made': made})
            except ValueError:
                self.gallery.check_room()
                raise
            del left[i]
            self.outcome.made += 1
            self.bar.console.print(f'{path} ({seconds:.1f} s)', highlight=False, soft_wrap=True, markup=False)
            self.bar.advance(self.pictures)

    def _note(self, todo: Todo, fault: Exception) -> None:
        """Tell why a picture was not made. Where the next ones would fail by the same, they are not tried."""
        self.bar.advance(self.pictures)
        told = words(fault)
        self.outcome.note(todo[0], told or f'{type(fault).__name__}: {fault} (an error of this program)')
        if told is None:
            # It may lie in the row; twice at the same place it does not.
            self.over = self.outcome.fault is not None and _place(self.outcome.fault) == _place(fault)
            self.outcome.fault = self.outcome.fault or fault
        self.over = self.over or isinstance(fault, NoRoomError)
        if self.over:
            self.outcome.errors.append('The pictures after that one were not tried.')


def _place(error: BaseException) -> tuple[str, int]:
    *_, last = traceback.walk_tb(error.__traceback__)
    return last[0].f_code.co_filename, last[1]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no room on the device. On a CPU torch says so by a RuntimeError of many words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or isinstance(error, RuntimeError) and any(
        mark in str(error) for mark in ('not enough memory', "can't allocate memory", 'out of memory', 'ALLOC_FAILED'))


def words(error: BaseException) -> str | None:
    """What to tell of an error that a user can mend, or None: it is one of this program."""
    if is_out_of_memory(error):
        first = (str(error).strip() or 'MemoryError').splitlines()[0][:200]
        return f"the device has no memory left ({first}). {launch.SMALLER['infer']}"
    known = (ValueError, OSError, Image.DecompressionBombError, SafetensorError)
    if isinstance(error, ImportError):
        return f'a package is missing: {error}'
    return (str(error) or type(error).__name__) if isinstance(error, known) else None


def say(outcome: Outcome) -> int:
    """Tell what became of it; the exit code: 1 if a row or a picture failed.

    Raises:
        BaseException: the outcome's `fault`.
    """
    parts = [f'{outcome.made} made'] + ([f'{outcome.present} there already'] if outcome.present else [])
    if outcome.made or outcome.present:
        print(f"{', '.join(parts)}: '{outcome.folder / 'index.html'}' shows them.")
    for error in outcome.errors:
        print(f'error: {error}', file=sys.stderr, flush=True)
    if outcome.fault is not None:
        raise outcome.fault
    return 1 if outcome.errors else 0
