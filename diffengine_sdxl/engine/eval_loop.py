"""Evaluation: make images of every sample, with the adapters and by the base alone, and measure them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_world_size, is_main_process
from mmengine.runner import BaseLoop
from PIL import Image

from diffengine_sdxl import atomic_files, rng
from diffengine_sdxl.datasets import FiniteSampler, collate
from diffengine_sdxl.engine import report
from diffengine_sdxl.engine.eval_images import condition_images, make_images, noise_seed, to_tensor
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, one_of, whole_number
from diffengine_sdxl.evaluation import networks
from diffengine_sdxl.evaluation.base import ImageMetric, difference_names
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.models.data_preprocessor import images_to_floats, pack
from diffengine_sdxl.models.generate import IMAGE_SETS
from diffengine_sdxl.registry import DATASETS, LOOPS, SCOPE
from diffengine_sdxl.samplers.sampler import output_size
from diffengine_sdxl.structures import Batch

#: Ends the name of a validation's table of images, beside `step<N>.json`.
SAMPLES = '.samples.csv'
#: The contact sheet, in `val` or `test`.
PICTURES = 'pictures.png'
#: What names of metrics must not hold.
NOT_IN_NAMES = '/,"\''


class EvalLoop(BaseLoop):
    """Make the images of every sample of a data set, pass them to the metrics and report the results.

    The weights are those that are exported: the EMA's if there is an EMA. Fixed batches are dealt to the processes,
    and an image's noise depends on the sample's key and the seed only; so numbers do not depend on the number of
    processes. Conditions are not dropped. The loop restores the global random state, the model's mode and weights.

    Args:
        runner, dataloader, evaluator: from the runner.
        seeds: of the initial noise: a list, or a number n for 0 ... n - 1. Each sample is made once for each seed.
        image_sets: of 'adapted', 'base' (no adapters), 'only_<name>' (one of several); None: `default_image_sets`.
        num_pictures: number of samples, from the first one on, that `<work_dir>/<mode>/pictures.png` shows.

    Raises:
        UserError: a setting is invalid, or the data cannot be used.
    """

    mode = ''
    runner: ExperimentRunner

    def __init__(self, runner: ExperimentRunner, dataloader: Any, evaluator: Any, seeds: int | Sequence[int] = 1,
                 image_sets: str | Sequence[str] | None = None, num_pictures: int = 8) -> None:
        self.seeds = self._check_seeds(seeds)
        self.num_pictures = whole_number(f'{self.mode}_cfg.num_pictures', num_pictures, 0)
        super().__init__(runner, self._with_finite_sampler(dataloader))
        self.image_sets = self._check_image_sets(image_sets)
        self._check_data()
        self.dataloader.sampler.batch_size = self.dataloader.batch_size
        self.num_samples = self.dataloader.sampler.num_rows
        self.evaluator = runner.build_evaluator(copy.deepcopy(evaluator))
        names = [metric_name(metric) for metric in self.image_metrics]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{self.mode}_evaluator has two metrics of the name '{twice[0]}'; give one a `prefix`.")
        for metric in self.image_metrics:
            for part in (metric.name, metric.prefix or metric.name):
                if not part or set(part) & {*NOT_IN_NAMES} or not part.isprintable():
                    raise UserError(f'{self.mode}_evaluator: {type(metric).__name__} has the name {part!r}; it stands '
                                    f'in tables and must not be empty, nor hold a line break or one of {NOT_IN_NAMES}')

    def default_image_sets(self) -> tuple[str, ...]:
        """Return the image sets that are made if the config names none."""
        return self.runner.bare_model.image_sets

    def _check_seeds(self, seeds: int | Sequence[int]) -> list[int]:
        values = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
        if not isinstance(values, list | tuple) or not values or len(set(map(str, values))) < len(values) or not all(
                type(seed) is int and 0 <= seed < 2**63 for seed in values):
            raise UserError(f'{self.mode}_cfg.seeds={seeds!r} must be a number of seeds, at least 1, or a list of '
                            'different whole numbers from 0.')
        return list(values)

    def _check_image_sets(self, image_sets: str | Sequence[str] | None) -> tuple[str, ...]:
        if image_sets is None:
            return self.default_image_sets()
        key, available = f'{self.mode}_cfg.image_sets', self.runner.bare_model.image_sets
        names = [image_sets] if isinstance(image_sets, str) else list(image_sets)
        if not names:
            raise UserError(f'{key} is empty; leave it out, or choose from {", ".join(map(repr, IMAGE_SETS))}.')
        available = (*available[:-1], *self.runner.bare_model.only_sets, *available[-1:])
        for name in names:
            one_of(key, name, dict.fromkeys((*IMAGE_SETS, *available)))
            if name not in available:
                raise UserError(f"{key} names 'adapted', but the model has no adapters; its own images are 'base'.")
        return tuple(name for name in available if name in names)

    def _with_finite_sampler(self, dataloader: Any) -> Any:
        """Return the data loader's config, with a sampler that reads each row once."""
        if not isinstance(dataloader, Mapping):
            return dataloader
        key, config = f'{self.mode}_dataloader', dict(copy.deepcopy(dataloader))
        if config.get('drop_last'):
            raise UserError(f'{key}.drop_last=True would leave samples out; an evaluation takes all of them.')
        sampler = config.get('sampler') or {'type': f'{SCOPE}.FiniteSampler'}
        if isinstance(sampler, Mapping) and str(sampler.get('type')).split('.')[-1] != 'FiniteSampler':
            raise UserError(f"{key}.sampler is {sampler.get('type')}; an evaluation takes each sample once, in order: "
                            'leave `sampler` out, or use FiniteSampler.')
        data: Any = config.get('dataset')
        data = DATASETS.build(data) if isinstance(data, Mapping) else data
        # What training drops at random would be missing in the prompts.
        data = data.without_drops() if hasattr(data, 'without_drops') else data
        return {'batch_size': 1, **config, 'dataset': data, 'sampler': sampler}

    def _check_data(self) -> None:
        key, data = f'{self.mode}_dataloader', self.dataloader.dataset
        if isinstance(data, torch.utils.data.IterableDataset):
            raise UserError(f'{key}.dataset is a stream; an evaluation needs data of known length. Use HFDataset, '
                            'with max_samples if it is large.')
        if not isinstance(self.dataloader.sampler, FiniteSampler):
            raise UserError(f'{key} must read with a FiniteSampler, which takes each sample once.')
        if len(data) == 0:
            raise UserError(f'{key}.dataset is empty: there is nothing to evaluate.')
        if getattr(data, 'on_bad_image', 'raise') == 'skip':
            raise UserError(f"{key}.dataset.on_bad_image='skip' would count the next sample twice in place of an "
                            "unreadable one; set 'raise' and take the bad file out.")

    @property
    def num_images_here(self) -> int:
        """Images that this process measures in one run."""
        return len(self.dataloader.sampler) * len(self.seeds) * len(self.image_sets)

    @torch.no_grad()
    def check(self) -> None:
        """Check before training that an image of the first sample can be made, and measured.

        Raises:
            UserError: an adapter lacks its input, the image size is not divisible, the data cannot be read, or a
                metric lacks a file.
        """
        self._check_metrics()
        first = next(iter(self.dataloader.sampler), None)
        if first is None:  # fewer batches than processes
            return
        batch, model = self._batch(collate([self.dataloader.dataset[first]])), self.runner.bare_model
        try:
            output_size(batch, model)
            model.encode(batch)
        except UserError as error:
            raise UserError(f'{self.mode}_dataloader: {error}') from error

    @property
    def image_metrics(self) -> list[ImageMetric]:
        """The metrics that know of files, networks and single images; others are any that mmengine takes."""
        return [metric for metric in getattr(self.evaluator, 'metrics', ()) if isinstance(metric, ImageMetric)]

    def _check_metrics(self) -> None:
        def check() -> list[str | None]:
            return [self._check_metric(metric) for metric in self.image_metrics]
        warnings = on_main_process(check)  # first in one process, as networks may have to be downloaded
        if not is_main_process():
            check()
        for warning in filter(None, warnings):
            self.runner.logger.warning(warning)

    def _check_metric(self, metric: ImageMetric) -> str | None:
        try:
            return metric.check(self.num_samples, len(self.seeds))
        except UserError as error:
            kind = type(metric).__name__
            where = f'{self.mode}_evaluator: ' if str(error).startswith(kind) else f'{self.mode}_evaluator: {kind}: '
            raise UserError(f'{where}{error}') from error

    def run(self) -> report.Results:
        """Make all images, compute the metrics, report the results."""
        runner, model = self.runner, self.runner.bare_model
        #: Key -> row and prompt of the samples that were measured, in the end by all processes.
        self._rows: dict[str, tuple[int, str]] = {}
        training = model.training
        self._hook('before_{}')
        self._hook('before_{}_epoch')
        model.eval()
        try:
            with torch.no_grad(), runner.exported_weights():
                for metric in self.image_metrics:
                    metric.device = model.device
                self.prepare()
                with rng.fork(runner.seed, 'evaluation', self.mode):
                    sheet = self.measure()
                    metrics = self._metrics()
        finally:
            model.train(training)
            networks.release()
        differences = difference_names(self.image_sets)
        results = report.group_by_image_set(metrics, (*self.image_sets, *differences))
        results = {name: found for name, found in results.items() if found or name not in differences}
        results |= self.retention_results()
        self._hook('after_{}_epoch', metrics=metrics)
        self._report(results, sheet)
        self._hook('after_{}')
        return results

    def prepare(self) -> None:
        """Do what comes before the first batch is measured, with the weights that are evaluated."""

    def retention_results(self) -> report.Results:
        return {}  # see TestLoop

    def images(self, data: Mapping[str, Any], batch: Batch, rows: Sequence[int], seed: int
               ) -> dict[str, list[Image.Image]]:
        """Return the images of a batch: image set -> B images.

        Args:
            data: as the loader collated it; batch: made of it, on the CPU.
            rows: the positions of its samples in the data.
        """
        raise NotImplementedError

    def _batches(self) -> Generator[tuple[range, Any], None, None]:
        """Yield the rows of each batch of this process, and what the loader collated of them."""
        iterator = iter(self.dataloader)
        try:
            yield from zip(self.dataloader.sampler.batches(), iterator, strict=True)
        finally:
            if not self.dataloader.persistent_workers:
                shut_down_workers(iterator)

    def measure(self) -> list[report.SheetRow]:
        """Measure the images of all batches of this process; return the contact sheet's rows."""
        with closing(self._batches()) as batches:
            return [row for index, (rows, data) in enumerate(batches) for row in self.run_iter(index, rows, data)]

    def run_iter(self, index: int, rows: range, data: Mapping[str, Any]) -> list[report.SheetRow]:
        """Measure the images of one batch for every seed; return the contact sheet's rows."""
        self._hook('before_{}_iter', batch_idx=index, data_batch=data)
        floats = images_to_floats(data)
        batch = pack(floats)
        for row, key, prompt in zip(rows, batch.key, batch.text, strict=True):
            self._note_key(key, row, prompt)
        outputs = []
        for seed in self.seeds:
            images = self.images(data, batch, rows, seed)
            outputs.append([{'key': key, 'seed': seed, 'noise_seed': noise_seed(seed, key), 'prompt': batch.text[i],
                             'images': {image_set: to_tensor(made[i]) for image_set, made in images.items()}}
                            for i, key in enumerate(batch.key)])
            self.evaluator.process(data_samples=outputs[-1], data_batch=floats)
        self._hook('after_{}_iter', batch_idx=index, data_batch=data,
                   outputs=[sample for samples in outputs for sample in samples])
        return [self._sheet_row(row, i, batch, outputs) for i, row in enumerate(rows) if row < self.num_pictures]

    def _note_key(self, key: str, row: int, prompt: str) -> None:
        """Note which row has a key.

        Raises:
            UserError: another row has it: noise and intervals would take both for one sample.
        """
        other, _ = self._rows.setdefault(key, (row, prompt))
        if other != row:
            raise UserError(f"{self.mode}_dataloader.dataset: rows {other} and {row} have the same key "
                            f"'{key}'; an evaluation takes each sample once. Of a Mixture leave out `weights` and "
                            '`repeats`; a data set of your own gives each row a key of its own.')

    def _batch(self, data: Mapping[str, Any]) -> Batch:
        """Move a batch to the device. Dropping conditions at random is for training."""
        return replace(self.runner.bare_model.data_preprocessor(data)['inputs'], drop={})

    def _metrics(self) -> dict[str, Any]:
        for metric in getattr(self.evaluator, 'metrics', ()):
            if get_world_size() > 1 and metric.collect_device == 'cpu' and metric.collect_dir is None:
                # mmengine would leave a folder in the current directory.
                metric.collect_dir = str(Path(self.runner.work_dir) / f'.{self.mode}.part')
        for rows in all_gather_object(self._rows):
            for key, (row, prompt) in rows.items():
                self._note_key(key, row, prompt)
        # mmengine cuts the results to this length, against the padding of its samplers; FiniteSampler does not pad.
        return self.evaluator.evaluate(sys.maxsize)

    def _sheet_row(self, position: int, i: int, batch: Batch, outputs: list[list[dict[str, Any]]]) -> report.SheetRow:
        images = condition_images(batch.conditions, i)
        for samples, seed in list(zip(outputs, self.seeds, strict=True))[:report.MAX_SEEDS]:
            for image_set, image in samples[i]['images'].items():
                column = image_set if len(self.seeds) == 1 else f'{image_set}, seed {seed}'
                images[column] = to_pil(image.numpy())
        return report.SheetRow(position, batch.text[i], images)

    def _report(self, results: report.Results, sheet: list[report.SheetRow]) -> None:
        """Write the table, the files of numbers and the contact sheet, in the main process."""
        sheet = [row for process_rows in all_gather_object(sheet) for row in process_rows]
        if not is_main_process():
            return
        runner, step = self.runner, self.step
        seeds = f' x {len(self.seeds)} seeds' if len(self.seeds) > 1 else ''
        title = f'{self.describe_weights()}, {self.num_samples} samples{seeds}'
        self.save(results)
        runner.log_lines(f'{title}\n{report.table(results)}')
        runner.visualizer.add_scalars({f'{self.mode}/{image_set.replace(" ", "")}/{name}': result['value']
                                       for image_set, metrics in results.items() for name, result in metrics.items()
                                       if result['value'] is not None}, step=step)
        runner.logger.info(f"Metrics: '{self.path()}'")
        if sheet:
            grid = report.contact_sheet(sheet, list(dict.fromkeys(name for row in sheet for name in row.images)), title)
            path = Path(runner.work_dir) / self.mode / PICTURES
            with atomic_files.replacing(path) as temporary:
                grid.save(temporary, format='PNG')
            runner.visualizer.add_image(f'{self.mode}_pictures', np.asarray(grid), step=step)
            runner.logger.info(f"Images: '{path}'")

    def save(self, results: report.Results) -> None:
        """Write the numbers and those of each image; `path()` comes last, as it says that all is there."""
        raise NotImplementedError

    def sample_rows(self, file: Callable[[str, int, int], str]) -> list[dict[str, Any]]:
        """Return a row for each image, see `report.save_samples`; in the order of the data.

        Args:
            file: of an image set, the row in the data, and a seed.
        """
        values: dict[tuple[str, int, str], dict[str, float]] = {}
        for metric in self.image_metrics:
            for image, value in metric.per_image().items():
                values.setdefault(image, {})[metric_name(metric)] = value
        return [{'key': key, 'seed': seed, 'noise_seed': noise_seed(seed, key), 'image_set': image_set,
                 'file': file(image_set, row, seed), 'prompt': prompt,
                 **values.get((key, seed, image_set), {})}
                for key, (row, prompt) in sorted(self._rows.items(), key=lambda item: item[1])
                for seed in self.seeds for image_set in self.image_sets]

    @property
    def step(self) -> int:
        """The optimizer step of the weights; 0 if unknown."""
        return self.runner.iter or self.runner.loaded_step or 0

    def describe_weights(self) -> str:
        """Describe the evaluated weights, for the table's title."""
        if self.runner.iter > 0:
            return f'step {self.step}{", EMA weights" if self.runner.ema is not None else ""}'
        return self.runner.loaded or ('the weights of the config' if self.runner.bare_model.adapters else
                                      'the base alone')

    def path(self) -> Path:
        """Return the path of the JSON file."""
        raise NotImplementedError

    def _hook(self, name: str, **kwargs: Any) -> None:
        self.runner.call_hook(name.format(self.mode), **kwargs)


@LOOPS.register_module()
class ValLoop(EvalLoop):
    """Evaluate every `train_cfg.val_interval` optimizer steps and at the end; write `val/step<N>.json`."""

    mode = 'val'

    def default_image_sets(self) -> tuple[str, ...]:
        """Return the images of the model as it trains: those of a frozen base would always be the same."""
        return super().default_image_sets()[-1:]

    def images(self, data: Mapping[str, Any], batch: Batch, rows: Sequence[int], seed: int
               ) -> dict[str, list[Image.Image]]:
        """Make the images of a batch."""
        inputs = self._batch(data)
        return {image_set: make_images(self.runner.bare_model, inputs, seed, image_set)
                for image_set in self.image_sets}

    def path(self) -> Path:
        """Return `val/step<N>.json`."""
        return Path(self.runner.work_dir) / 'val' / f'step{self.step}.json'

    def save(self, results: report.Results) -> None:
        """Write `val/step<N>.samples.csv` and `val/step<N>.json`."""
        report.save_samples(self.path().with_suffix(SAMPLES), self.sample_rows(lambda *_: ''))
        report.save(self.path(), results)

    def remove_results_after(self, step: int) -> None:
        """Remove the results of later steps, which an interrupted run left; they are made again."""
        for suffix in ('.json', SAMPLES) if is_main_process() else ():
            for later, path in report.step_files(self.path().parent, suffix).items():
                if later > step:
                    path.unlink()


def metric_name(metric: ImageMetric) -> str:
    """Return the name of a metric in results and tables of images."""
    return f'{metric.prefix}/{metric.name}' if metric.prefix else metric.name


def shut_down_workers(batches: Any) -> None:
    """End the workers of a data loader's iterator: after an error, garbage collection takes 5 s for each."""
    if hasattr(batches, '_shutdown_workers'):
        batches._shutdown_workers()
