"""The evaluation of `mim test`: images as files, which a killed test and a later one go on with; two checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, get_world_size, is_main_process
from PIL import Image

from diffengine_sdxl import rng
from diffengine_sdxl.engine import report, work_dir_lock
from diffengine_sdxl.engine.eval_images import (
    CONDITIONS,
    ImageFiles,
    condition_images,
    image_records,
    made_from,
    make_images,
)
from diffengine_sdxl.engine.eval_loop import PICTURES, EvalLoop, metric_name
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, count_of, listed, one_of
from diffengine_sdxl.evaluation.base import MeanMetric
from diffengine_sdxl.evaluation.retention import retention
from diffengine_sdxl.loading.trained import other_weights
from diffengine_sdxl.models.generate import ADAPTED, BASE, COMPARED, ONLY
from diffengine_sdxl.registry import LOOPS
from diffengine_sdxl.structures import Batch

#: Seconds between log lines while images are made.
LOG_INTERVAL = 30.0
#: The table of images, in `test`.
SAMPLES = 'samples.csv'
#: What an image may be outdated in -> why, for people.
OUTDATED = {'conditions': 'the conditions of their samples have changed',
            'batch_size': 'their batch, the last one, had another size'}
OTHER_SAMPLE = 'the data have other samples in their rows, or other prompts'


@LOOPS.register_module()
class TestLoop(EvalLoop):
    """Make the images of a test that are not there yet, as files; then measure the files and write `metrics.json`.

    Args:
        runner, dataloader, evaluator, seeds, image_sets, num_pictures: see EvalLoop.
        retention: adapter -> name of a metric, or several, such as dict(layout='iou'): report how much of what it does
            alone is left beside the others, see `evaluation.retention`; of each alone an image set is made. None as
            the names leaves an adapter out.
        compare: a checkpoint or export, loaded strictly, that makes the image set 'compared'.

    Raises:
        UserError: a setting is invalid, or the data cannot be used.
    """

    mode = 'test'

    def __init__(self, runner: ExperimentRunner, dataloader: Any, evaluator: Any, seeds: int | Sequence[int] = 1,
                 image_sets: str | Sequence[str] | None = None, num_pictures: int = 8, compare: str | None = None,
                 retention: Mapping[str, str | Sequence[str] | None] | None = None) -> None:
        self.compare, self._compared = compare, ''
        # With `--checkpoint none` the config's adapters are gone, and with them what they keep.
        measured = (retention or {}) if runner.bare_model.adapters else {}
        self.retention = {adapter: [names] if isinstance(names, str) else list(names)
                          for adapter, names in measured.items() if names is not None}
        super().__init__(runner, dataloader, evaluator, seeds, image_sets, num_pictures)
        self._check_retention()
        self.folder = Path(runner.work_dir) / 'test'
        self.files = ImageFiles(self.folder / 'images')

    def _check_image_sets(self, image_sets: str | Sequence[str] | None) -> tuple[str, ...]:
        names = [image_sets] if isinstance(image_sets, str) else image_sets
        if names is not None and COMPARED in names:
            if self.compare is None:
                raise UserError(f"test_cfg.image_sets names '{COMPARED}', but nothing is compared; add --compare W2, a "
                                'second checkpoint.')
            names = [name for name in names if name != COMPARED]
        own = () if names == [] and self.compare is not None else super()._check_image_sets(names)
        return own if self.compare is None else (*own, COMPARED)

    def default_image_sets(self) -> tuple[str, ...]:
        """Return the base and all adapters, and each of them alone whose retention is measured."""
        base, *adapted = super().default_image_sets()
        return (base, *(f'{ONLY}{name}' for name in self.retention), *adapted)

    def _check_retention(self) -> None:
        metrics = {metric_name(metric): metric for metric in self.image_metrics}
        for adapter, names in self.retention.items():
            key, only = f'test_cfg.retention.{adapter}', self.runner.bare_model.only_sets
            if f'{ONLY}{adapter}' not in only:
                raise UserError(f'{key}: the model has no adapter of this name beside others; it has '
                                f'{listed(self.runner.bare_model.adapters) or "none"}.')
            if not names:
                raise UserError(f'{key} names no metric; name one of {listed(metrics)}, or None to leave it out.')
            for name in names:
                one_of(key, name, metrics)
                if not isinstance(metrics[name], MeanMetric):
                    raise UserError(f"{key}: '{name}' has no score for each image, which retention is a ratio of.")
            if missing := [s for s in (BASE, f'{ONLY}{adapter}', ADAPTED) if s not in self.image_sets]:
                raise UserError(f"{key} needs the image set '{missing[0]}'; add it to test_cfg.image_sets, or leave "
                                'image_sets out.')

    def retention_results(self) -> report.Results:
        """Return the retention of each adapter."""
        if not self.retention or not is_main_process():
            return {}
        metrics = {metric_name(m): m for m in self.image_metrics if isinstance(m, MeanMetric)}
        found = retention(metrics, self.retention, ADAPTED, BASE, ONLY)
        return {'retention': {name: {**{key: report.finite(value) for key, value in one._asdict().items()},
                                     'num_samples': one.num_samples, 'better': 1} for name, one in found.items()}}

    def prepare(self) -> None:
        """Make the images that are not there, with the tested weights and then with those to compare."""
        self._check_metrics()  # what is wrong is said before a file is touched
        runner, model = self.runner, self.runner.bare_model
        own = [name for name in self.image_sets if name != COMPARED]
        records = self._records(own)
        if self.compare is not None:
            with other_weights(model, self.compare) as self._compared:
                records |= self._records([COMPARED])
            if own and records[own[-1]]['weights'] == records[COMPARED]['weights']:
                raise UserError(f'--compare {self.compare}: these are the weights that are tested, those of '
                                f'{super().describe_weights()}; name another checkpoint, or leave out --compare.')
        source = runner.resolved.get('load_from') if runner.loaded else None
        about = {'checkpoint': source and str(Path(source).resolve()), 'weights': self.describe_weights(),
                 'seeds': self.seeds, 'num_samples': self.num_samples,
                 'dataset': runner.resolved.test_dataloader.dataset}
        results = [self.path(), self.path().with_suffix('.csv'), *(self.folder / name for name in (SAMPLES, PICTURES))]
        on_main_process(lambda: work_dir_lock.acquire(self.folder, 'tests'))
        for sentence in on_main_process(lambda: self.files.claim(records, about, results)):
            runner.logger.warning(sentence)
        runner.dump_test_config()
        self._make_all()

    def _make_all(self) -> None:
        self._make([name for name in self.image_sets if name != COMPARED])
        if self.compare is not None:
            with other_weights(self.runner.bare_model, self.compare):
                self._make([COMPARED])
        barrier()

    def _records(self, image_sets: Sequence[str]) -> dict[str, dict[str, Any]]:
        return on_main_process(lambda: image_records(
            self.runner.bare_model, self.runner.resolved, image_sets))

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
                        images = make_images(runner.bare_model, batch, seed, image_set)
                        self._save(images, data, rows, seed, image_set)
                        done += len(rows)
                        runner.call_hook('after_test_images', done=done, total=total)
                        now = time.monotonic()
                        if now - logged > LOG_INTERVAL:
                            logged, here = now, '' if get_world_size() == 1 else ' of this process'
                            runner.logger.info(f'{done} of {total} images {names}{here} are made; about '
                                               f'{(now - began) / done * (total - done) / 60:.0f} min left.')
        finally:
            sampler.done = ()

    def _save(self, images: Sequence[Image.Image], data: Mapping[str, Any], rows: range, seed: int, image_set: str
              ) -> None:
        for i, (image, row) in enumerate(zip(images, rows, strict=True)):
            path = self.files.path(image_set, row, seed)
            made = made_from(self.runner.bare_model, data, i, seed, image_set)
            if self.files.made_from(path) != made:
                self.files.save(path, image, made)

    def _save_conditions(self, batch: Batch, rows: range) -> None:
        for i, row in enumerate(rows):
            for name, image in condition_images(batch.conditions, i).items():
                self.files.save(self.files.folder / CONDITIONS / f'{row:06d}_{name}.png', image)

    def measure(self) -> list[report.SheetRow]:
        """See EvalLoop; images that this test would make otherwise are made again, once, and then measured."""
        self._outdated: dict[int, dict[str, str]] | None = {}
        sheet = super().measure()
        outdated = {first: paths for found in all_gather_object(self._outdated) for first, paths in found.items()}
        if not outdated:
            return sheet
        self._outdated = None
        reasons = [reason for paths in outdated.values() for reason in paths.values()]
        self.runner.logger.warning(
            f'{count_of(len(reasons), "image", "images")} of an earlier test, such as '
            f"'{next(iter(outdated[min(outdated)]))}', are removed and made again: {listed(sorted({*reasons}))}.")
        self._make_all()
        sampler = self.dataloader.sampler
        sampler.done = [rows.start for rows in sampler.all_batches() if rows.start not in outdated]
        try:
            return sheet + super().measure()
        finally:
            sampler.done = ()

    def run_iter(self, index: int, rows: range, data: Mapping[str, Any]) -> list[report.SheetRow]:
        """See EvalLoop; remove the images of a batch that are outdated, and leave it for later."""
        if self._outdated is not None and (paths := self._find_outdated(rows, data)):
            for path in paths:
                Path(path).unlink()
            self._outdated[rows.start] = paths
            return []
        return super().run_iter(index, rows, data)

    def _find_outdated(self, rows: range, data: Mapping[str, Any]) -> dict[str, str]:
        """Return the path of each image of a batch that was made from something else, and of what."""
        paths: dict[str, str] = {}
        for image_set, seed, (i, row) in itertools.product(self.image_sets, self.seeds, enumerate(rows)):
            path = self.files.path(image_set, row, seed)
            new, old = made_from(self.runner.bare_model, data, i, seed, image_set), self.files.made_from(path)
            if old is not None and (changed := [name for name in new if old.get(name) != new[name]]):
                paths[str(path)] = OUTDATED.get(changed[0], OTHER_SAMPLE)
        return paths

    def images(self, data: Mapping[str, Any], batch: Batch, rows: Sequence[int], seed: int
               ) -> dict[str, list[Image.Image]]:
        """Read the images of a batch.

        Raises:
            UserError: a file is missing or damaged, or its size is not that of the others.
        """
        found: dict[str, list[Image.Image]] = {}
        for image_set in self.image_sets:
            for row in rows:
                image = self.files.read(path := self.files.path(image_set, row, seed))
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
        report.save_samples(self.folder / SAMPLES, self.sample_rows(
            lambda image_set, row, seed: self.files.path(image_set, row, seed).relative_to(self.folder).as_posix()))
        report.save_table(self.path().with_suffix('.csv'), results)
        report.save(self.path(), results)

    @torch.no_grad()
    def run(self) -> report.Results:
        """Make and measure all images, and write the numbers and the report page.

        Raises:
            UserError: another process tests in this work_dir; or the images cannot be made or measured.
        """
        from diffengine_sdxl.pages.run_report import write_report
        try:
            results = super().run()
            if is_main_process():
                self.runner.logger.info(f"Report: '{write_report(Path(self.runner.work_dir))}'")
            return results
        finally:
            work_dir_lock.release(self.folder)
