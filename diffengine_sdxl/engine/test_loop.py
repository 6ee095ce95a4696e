"""The evaluation of `mim test`: images as files, which a killed test and a later one go on with; two checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, get_world_size, is_main_process
from PIL import Image

from diffengine_sdxl import rng
from diffengine_sdxl.engine import report
from diffengine_sdxl.engine.eval_images import (
    CONDITIONS,
    ImageFiles,
    condition_images,
    image_records,
    make_images,
    noise_seed,
    sample_text,
)
from diffengine_sdxl.engine.eval_loop import EvalLoop
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.trained import other_weights
from diffengine_sdxl.models.generate import COMPARED
from diffengine_sdxl.registry import LOOPS
from diffengine_sdxl.structures import Batch

#: Seconds between log lines while images are made.
LOG_INTERVAL = 30.0


@LOOPS.register_module()
class TestLoop(EvalLoop):
    """Make the images of a test that are not there yet, as files; then measure the files and write `metrics.json`.

    Args:
        runner, dataloader, evaluator, seeds, image_sets, num_pictures: see EvalLoop.
        compare: a checkpoint or export, loaded strictly, that makes the image set 'compared'.

    Raises:
        UserError: a setting is invalid, or the data cannot be used.
    """

    mode = 'test'

    def __init__(self, runner: ExperimentRunner, dataloader: Any, evaluator: Any, seeds: int | Sequence[int] = 1,
                 image_sets: str | Sequence[str] | None = None, num_pictures: int = 8, compare: str | None = None
                 ) -> None:
        self.compare, self._compared = compare, ''
        super().__init__(runner, dataloader, evaluator, seeds, image_sets, num_pictures)
        self.files = ImageFiles(Path(runner.work_dir) / 'test' / 'images')

    def _check_image_sets(self, image_sets: str | Sequence[str] | None) -> tuple[str, ...]:
        names = [image_sets] if isinstance(image_sets, str) else image_sets
        if names is not None and COMPARED in names:
            if self.compare is None:
                raise UserError(f"test_cfg.image_sets names '{COMPARED}', but nothing is compared; add --compare W2, a "
                                'second checkpoint.')
            names = [name for name in names if name != COMPARED]
        own = () if names == [] and self.compare is not None else super()._check_image_sets(names)
        return own if self.compare is None else (*own, COMPARED)

    def prepare(self) -> None:
        """Make the images that are not there, with the tested weights and then with those to compare."""
        self._check_metrics()
        runner, model = self.runner, self.runner.bare_model
        own = [name for name in self.image_sets if name != COMPARED]
        records = self._records(own)
        if self.compare is not None:
            with other_weights(model, self.compare) as self._compared:
                records |= self._records([COMPARED])
        source = runner.resolved.get('load_from') if runner.loaded else None
        about = {'checkpoint': source and str(Path(source).resolve()), 'weights': self.describe_weights(),
                 'seeds': self.seeds, 'num_samples': self.num_samples,
                 'dataset': runner.resolved.test_dataloader.dataset}
        for sentence in on_main_process(lambda: self.files.claim(records, about)):
            runner.logger.warning(sentence)
        self._make(own)
        if self.compare is not None:
            with other_weights(model, self.compare):
                self._make([COMPARED])
        barrier()

    def _records(self, image_sets: Sequence[str]) -> dict[str, dict[str, Any]]:
        return on_main_process(lambda: image_records(
            self.runner.bare_model, self.runner.resolved, self.num_samples, image_sets))

    def _make(self, image_sets: Sequence[str]) -> None:
        """Make what is missing of some image sets with the weights that the model has."""
        sampler, runner = self.dataloader.sampler, self.runner
        missing = on_main_process(lambda: {
            rows.start: calls for rows in sampler.all_batches()
            if (calls := self.files.missing(image_sets, rows, self.seeds))})
        sampler.done = [rows.start for rows in sampler.all_batches() if rows.start not in missing]
        batches = sampler.batches()
        total = sum(len(rows) * len(missing[rows.start]) for rows in batches)
        in_all = sum(map(len, sampler.all_batches())) * len(self.seeds) * len(image_sets)
        to_make = sum(len(rows) * len(missing.get(rows.start, ())) for rows in sampler.all_batches())
        names = ' and '.join(f"'{name}'" for name in image_sets)
        if to_make < in_all:
            runner.logger.info(f'{in_all - to_make} of {in_all} images {names} are there already.')
        began, logged, done = time.monotonic(), time.monotonic(), 0
        try:
            with rng.fork(runner.seed, 'evaluation', self.mode, 'images'), closing(self._batches()) as loaded:
                for rows, data in loaded if missing else ():
                    batch = self._batch(data)
                    self._save_conditions(batch, rows)
                    for seed, image_set in missing[rows.start]:
                        self._save(make_images(runner.bare_model, batch, seed, image_set), batch, rows, seed, image_set)
                        done += len(rows)
                        runner.call_hook('after_test_images', done=done, total=total)
                        now = time.monotonic()
                        if now - logged > LOG_INTERVAL:
                            logged, here = now, '' if get_world_size() == 1 else ' of this process'
                            runner.logger.info(f'{done} of {total} images {names}{here} are made; about '
                                               f'{(now - began) / done * (total - done) / 60:.0f} min left.')
        finally:
            sampler.done = ()

    def _save(self, images: Sequence[Image.Image], batch: Batch, rows: range, seed: int, image_set: str) -> None:
        for image, row, key, prompt in zip(images, rows, batch.key, batch.text, strict=True):
            self.files.save(self.files.path(image_set, row, seed), image,
                            sample_text(key, prompt, noise_seed(seed, key)))

    def _save_conditions(self, batch: Batch, rows: range) -> None:
        for i, row in enumerate(rows):
            for name, image in condition_images(batch.conditions, i).items():
                self.files.save(self.files.folder / CONDITIONS / f'{row:06d}_{name}.png', image)

    def images(self, data: Mapping[str, Any], batch: Batch, rows: Sequence[int], seed: int
               ) -> dict[str, list[Image.Image]]:
        """Read the images of a batch.

        Raises:
            UserError: a file is missing, damaged or of another sample, or its size is not that of the others.
        """
        found: dict[str, list[Image.Image]] = {}
        for image_set in self.image_sets:
            for row, key, prompt in zip(rows, batch.key, batch.text, strict=True):
                path = self.files.path(image_set, row, seed)
                image = self.files.read(path, sample_text(key, prompt, noise_seed(seed, key)))
                found.setdefault(image_set, []).append(image)
                if image.size != (size := found[image_set][0].size):
                    raise UserError(f"The image '{path}' has {image.width} x {image.height} pixels, the others of its "
                                    f'batch have {size[0]} x {size[1]}; remove it and test again.')
        return found

    def describe_weights(self) -> str:
        """Describe the evaluated weights, and those that they are compared with."""
        compared = f', compared with {self._compared}' if self._compared else ''
        return f'{super().describe_weights()}{compared}'

    def path(self) -> Path:
        """Return `metrics.json`."""
        return Path(self.runner.work_dir) / 'metrics.json'

    def save(self, results: report.Results) -> None:
        """Write `test/samples.csv`, `metrics.csv` and `metrics.json`."""
        folder = self.files.folder.parent
        report.save_samples(folder / 'samples.csv', self.sample_rows(
            lambda image_set, row, seed: self.files.path(image_set, row, seed).relative_to(folder).as_posix()))
        report.save_table(self.path().with_suffix('.csv'), results)
        report.save(self.path(), results)

    @torch.no_grad()
    def run(self) -> report.Results:
        """Make and measure all images, and write the numbers and the report page."""
        from diffengine_sdxl.pages.run_report import write_report
        results = super().run()
        if is_main_process():
            self.runner.logger.info(f"Report: '{write_report(Path(self.runner.work_dir))}'")
        return results
