"""Generate and save images in batches; one failure does not stop the rest."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from diffengine_sdxl.commands.infer.image_folder import FolderError, ImageFolder
from diffengine_sdxl.errors import is_out_of_memory, user_message
from diffengine_sdxl.inference.inferencer import Job, SDXLInferencer
from diffengine_sdxl.request import Request
from diffengine_sdxl.versions import versions

OUT_OF_MEMORY = 'A smaller --batch-size or size, vae_tiling=True or offload=True (--set) may help.'


@dataclass
class ImageJob:
    """One image of the command.

    Attributes:
        number: among all images; broken rows count too, so that files keep their names when the rows are fixed.
        where: names its row in errors.
    """

    number: int
    where: str
    request: Request


@dataclass
class RunResult:
    """What a command has made.

    Attributes:
        made, present: numbers of images that are new, and that existed already.
        errors: what was not made, and why.
        fault: a Ctrl-C, or the first internal error; raised after everything else is reported.
    """

    folder: Path
    made: int = 0
    present: int = 0
    errors: list[str] = field(default_factory=list)
    fault: BaseException | None = None

    def add_error(self, job: ImageJob, message: str) -> None:
        """Note why `job` was not made; once for all images of a row."""
        message = f'{job.where}: {message}' if job.where else message
        if message not in self.errors:
            self.errors.append(message)


#: An image to make, its path, and its settings.
PendingImage = tuple[ImageJob, Path, dict[str, Any]]


class BatchRunner:
    """Make images, write them and report each."""

    def __init__(self, inferencer: SDXLInferencer, folder: ImageFolder, result: RunResult) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        self.inferencer, self.folder, self.result = inferencer, folder, result
        self.progress = Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                                 TimeRemainingColumn(), console=Console(stderr=True))
        self.images, self.steps = (self.progress.add_task(name, total=None) for name in ('images', 'steps'))
        self.stopped = False

    def make_all(self, pending: Iterable[PendingImage], batch_size: int, total: int) -> None:
        """Make all images, `batch_size` in a batch.

        Args:
            total: how many there are, with those that exist already.
        """
        images = iter(pending)
        with self.progress, self.inferencer.cached_inputs():
            while not self.stopped and (batch := list(islice(images, batch_size))):
                self.progress.update(self.images, total=total - self.result.present)
                self._make(batch)

    def _make(self, batch: Sequence[PendingImage]) -> None:
        if self.stopped:
            return
        left = dict(enumerate(batch))
        try:
            for job in self.inferencer.preprocess([one.request for one, *_ in batch], len(batch)):
                self._run_job(job, left)
            return
        except Exception as error:
            fault = error
            # The frames keep tensors on the device alive.
            traceback.clear_frames(fault.__traceback__)
        if is_out_of_memory(fault):
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        if len(batch) == 1 or isinstance(fault, FolderError):
            self._note(next(iter(left.values()), batch[0]), fault)
        else:
            # One of several is at fault: make each alone to find out which.
            for one in left.values():
                self._make([one])

    def _run_job(self, job: Job, left: dict[int, PendingImage]) -> None:
        """Make a job's images, and remove from `left` each that is written."""
        began = time.perf_counter()
        images = self.inferencer.postprocess(list(self.inferencer.forward(
            job, on_step=lambda done, total: self.progress.update(self.steps, completed=done, total=total))))
        seconds = (time.perf_counter() - began) / len(images)
        made = {'versions': versions(), 'device': str(self.inferencer.device), 'seconds': round(seconds, 3),
                'batch_size': len(images), 'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
        for i, image in zip(job.indices, images, strict=True):
            _, path, settings = left[i]
            self.folder.add(path, image, {**settings, 'made': made})
            del left[i]
            self.result.made += 1
            self.progress.console.print(f'{path} ({seconds:.1f} s)', highlight=False, soft_wrap=True, markup=False)
            self.progress.advance(self.images)

    def _note(self, pending: PendingImage, fault: Exception) -> None:
        """Note why an image was not made, and stop if the next ones would fail the same way."""
        self.progress.advance(self.images)
        message = user_message(fault, OUT_OF_MEMORY)
        self.result.add_error(pending[0], message or f'{type(fault).__name__}: {fault} (internal error; please report '
                              'it)')
        if message is None:
            # A bug may depend on the row; twice at the same place it does not.
            self.stopped = self.result.fault is not None and _place(self.result.fault) == _place(fault)
            self.result.fault = self.result.fault or fault
        if self.stopped or isinstance(fault, FolderError):
            self.stopped = True
            self.result.errors.append('The remaining images were skipped.')


def _place(error: BaseException) -> tuple[str, int]:
    *_, last = traceback.walk_tb(error.__traceback__)
    return last[0].f_code.co_filename, last[1]


def print_summary(result: RunResult) -> int:
    """Print what was made, and return the exit code: 1 if a row or an image failed.

    Raises:
        BaseException: the result's `fault`.
    """
    if result.made or result.present:
        present = f', {result.present} already present' if result.present else ''
        print(f"{result.made} made{present}: see '{result.folder / 'index.html'}'.")
    for error in result.errors:
        print(f'error: {error}', file=sys.stderr, flush=True)
    if result.fault is not None:
        raise result.fault
    return 1 if result.errors else 0
