"""Validation and test: make images of every sample, with the adapters and by the base alone, and measure them."""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_dist_info, get_world_size, is_main_process
from mmengine.runner import BaseLoop

from diffengine_sdxl import atomic_files, rng
from diffengine_sdxl.datasets import FiniteSampler, collate
from diffengine_sdxl.engine import report
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, one_of, whole_number
from diffengine_sdxl.images import to_pil
from diffengine_sdxl.models.data_preprocessor import images_to_floats
from diffengine_sdxl.models.generate import IMAGE_SETS
from diffengine_sdxl.registry import LOOPS, SCOPE
from diffengine_sdxl.samplers.sampler import output_size
from diffengine_sdxl.structures import Batch


class EvalLoop(BaseLoop):
    """Make the images of every sample of a data set, pass them to the metrics and report the results.

    The weights are those that are exported: the EMA's if there is an EMA. Each sample is read once, by one process;
    conditions are not dropped. The loop restores the global random state, the model's mode and its weights.

    Args:
        runner, dataloader, evaluator: from the runner.
        seeds: of the initial noise: a list, or a number n for 0 ... n - 1. Each sample is made once for each seed.
        image_sets: 'adapted', 'base' (without the adapters) or both; None for those of `default_image_sets`.
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
        self.evaluator = runner.build_evaluator(copy.deepcopy(evaluator))

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
        for name in names:
            one_of(key, name, IMAGE_SETS)
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
        return {'batch_size': 1, **config, 'sampler': sampler}

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
        """Images that this process makes in one run."""
        return len(self.dataloader.sampler) * len(self.seeds) * len(self.image_sets)

    @torch.no_grad()
    def check(self) -> None:
        """Check before training that an image of the first sample can be made.

        Raises:
            UserError: an adapter lacks its input, the image size is not divisible, or the data cannot be read.
        """
        first = next(iter(self.dataloader.sampler), None)
        if first is None:  # fewer samples than processes
            return
        batch = self._batch(collate([self.dataloader.dataset[first]]))
        model = self.runner.bare_model
        try:
            output_size(batch, model)
            model.encode(batch)
        except UserError as error:
            raise UserError(f'{self.mode}_dataloader: {error}') from error

    def run(self) -> report.Results:
        """Make all images, compute the metrics, report the results."""
        runner, model = self.runner, self.runner.bare_model
        rows: list[report.SheetRow] = []
        training = model.training
        self._hook('before_{}')
        self._hook('before_{}_epoch')
        model.eval()
        try:
            with torch.no_grad(), rng.fork(runner.seed, 'evaluation', self.mode), runner.exported_weights(), \
                    closing(self._batches()) as batches:
                for index, data in enumerate(batches):
                    rows += self.run_iter(index, data)
                metrics = self._metrics()
        finally:
            model.train(training)
        results = report.group_by_image_set(metrics, self.image_sets)
        self._hook('after_{}_epoch', metrics=metrics)
        self._hook('after_{}')
        self._report(results, rows)
        return results

    def _batches(self) -> Generator[Any, None, None]:
        iterator = iter(self.dataloader)
        try:
            yield from iterator
        finally:
            if not self.dataloader.persistent_workers:
                shut_down_workers(iterator)

    def run_iter(self, index: int, data: Mapping[str, Any]) -> list[report.SheetRow]:
        """Make the images of one batch for every seed and pass them to the metrics; return the contact sheet's rows."""
        self._hook('before_{}_iter', batch_idx=index, data_batch=data)
        batch, outputs, floats = self._batch(data), [], images_to_floats(data)
        for seed in self.seeds:
            inputs = replace(batch, seed=torch.full((len(batch),), seed, dtype=torch.int64))
            samples = self.runner.bare_model(inputs, mode='predict', image_sets=self.image_sets)
            for sample in samples:
                sample['images'] = {image_set: image.cpu() for image_set, image in sample['images'].items()}
            self.evaluator.process(data_samples=samples, data_batch=floats)
            outputs.append(samples)
        self._hook('after_{}_iter', batch_idx=index, data_batch=data,
                   outputs=[sample for samples in outputs for sample in samples])
        return self._sheet_rows(index, batch, outputs)

    def _batch(self, data: Mapping[str, Any]) -> Batch:
        """Move a batch to the device. Dropping conditions at random is for training."""
        return replace(self.runner.bare_model.data_preprocessor(data)['inputs'], drop={})

    def _metrics(self) -> dict[str, Any]:
        for metric in getattr(self.evaluator, 'metrics', ()):
            if get_world_size() > 1 and metric.collect_device == 'cpu' and metric.collect_dir is None:
                # mmengine would leave a folder in the current directory.
                metric.collect_dir = str(Path(self.runner.work_dir) / f'.{self.mode}.part')
        # mmengine cuts the results to this length, against the padding of its samplers; FiniteSampler does not pad.
        return self.evaluator.evaluate(sys.maxsize)

    def _sheet_rows(self, batch_index: int, batch: Batch, outputs: list[list[dict[str, Any]]]) -> list[report.SheetRow]:
        rank, world = get_dist_info()
        conditions = {name: x for name, x in batch.conditions.items() if x.dim() == 4 and x.shape[1] in (1, 3)}
        rows = []
        for i in range(len(batch)):
            position = rank + world * (batch_index * self.dataloader.batch_size + i)
            if position >= self.num_pictures:
                break
            images = {name: to_pil(image[i].float().cpu().numpy()) for name, image in conditions.items()}
            for samples, seed in list(zip(outputs, self.seeds, strict=True))[:report.MAX_SEEDS]:
                for image_set, image in samples[i]['images'].items():
                    column = image_set if len(self.seeds) == 1 else f'{image_set}, seed {seed}'
                    images[column] = to_pil(image.float().numpy())
            rows.append(report.SheetRow(position, batch.text[i], images))
        return rows

    def _report(self, results: report.Results, rows: list[report.SheetRow]) -> None:
        """Write the table, the JSON file and the contact sheet, in the main process."""
        rows = [row for process_rows in all_gather_object(rows) for row in process_rows]
        if not is_main_process():
            return
        runner, step = self.runner, self.step
        seeds = f' x {len(self.seeds)} seeds' if len(self.seeds) > 1 else ''
        title = f'{self.describe_weights()}, {len(self.dataloader.dataset)} samples{seeds}'
        report.save(self.path(), results)
        runner.log_lines(f'{title}\n{report.table(results)}')
        runner.visualizer.add_scalars({f'{self.mode}/{image_set}/{name}': result['value']
                                       for image_set, metrics in results.items() for name, result in metrics.items()
                                       if result['value'] is not None}, step=step)
        runner.logger.info(f"Metrics: '{self.path()}'")
        if rows:
            sheet = report.contact_sheet(rows, list(dict.fromkeys(name for row in rows for name in row.images)), title)
            path = Path(runner.work_dir) / self.mode / 'pictures.png'
            with atomic_files.replacing(path) as temporary:
                sheet.save(temporary, format='PNG')
            runner.visualizer.add_image(f'{self.mode}_pictures', np.asarray(sheet), step=step)
            runner.logger.info(f"Images: '{path}'")

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

    def path(self) -> Path:
        """Return `val/step<N>.json`."""
        return Path(self.runner.work_dir) / 'val' / f'step{self.step}.json'

    def remove_results_after(self, step: int) -> None:
        """Remove the results of later steps, which an interrupted run left; they are made again."""
        if is_main_process():
            for later, path in report.step_files(self.path().parent).items():
                if later > step:
                    path.unlink()


@LOOPS.register_module()
class TestLoop(EvalLoop):
    """The evaluation of `mim test`; write `metrics.json`."""

    mode = 'test'

    def path(self) -> Path:
        """Return `metrics.json`."""
        return Path(self.runner.work_dir) / 'metrics.json'


def shut_down_workers(batches: Any) -> None:
    """End the workers of a data loader's iterator: after an error, garbage collection takes 5 s for each."""
    if hasattr(batches, '_shutdown_workers'):
        batches._shutdown_workers()
