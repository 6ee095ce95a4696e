"""Validation and test: pictures of every sample, by the model and by its base alone, and metrics of them."""

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
from torch import Tensor

from diffengine_sdxl import rng
from diffengine_sdxl.datasets import FiniteSampler, collate
from diffengine_sdxl.engine import checkpoint, report
from diffengine_sdxl.models.predictions import VARIANTS
from diffengine_sdxl.pictures import to_pil
from diffengine_sdxl.registry import LOOPS, SCOPE
from diffengine_sdxl.samplers.sampler import picture_size
from diffengine_sdxl.structures import Batch


class EvalLoop(BaseLoop):
    """Makes the pictures of every sample of a data set, hands them to metrics and reports what they found.

    The weights are those that are exported: the EMA's if there is an EMA. Each sample is read once, by one process;
    conditions are not dropped. The global random state, the model's mode and its weights are afterwards what they
    were.

    Args:
        runner, dataloader, evaluator: from the runner.
        seeds: of the starting noise: a list, or a number n for 0 ... n - 1; each sample is made once for each.
        variants: 'adapted', 'base' (the base alone) or both; None takes those of `defaults`.
        num_pictures: how many samples, from the first one on, are shown on `<work_dir>/<mode>/pictures.png`.

    Raises:
        ValueError: a setting or the data cannot be used; which.
    """

    mode = ''

    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, seeds: int | Sequence[int] = 1,
                 variants: Sequence[str] | None = None, num_pictures: int = 8) -> None:
        self.seeds = self._checked_seeds(seeds)
        if isinstance(num_pictures, bool) or not isinstance(num_pictures, int) or num_pictures < 0:
            raise ValueError(f'{self.mode}_cfg.num_pictures={num_pictures!r} must be a whole number, 0 for none.')
        self.num_pictures = num_pictures
        super().__init__(runner, self._finite(dataloader))
        self.variants = self._checked_variants(variants)
        self._check_data()
        self.evaluator = runner.build_evaluator(copy.deepcopy(evaluator))

    def defaults(self, variants: tuple[str, ...]) -> tuple[str, ...]:
        """Which of a model's variants are made where the config says nothing."""
        return variants

    def _checked_seeds(self, seeds: int | Sequence[int]) -> list[int]:
        given = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds
        if not isinstance(given, list | tuple) or not given or len(set(map(str, given))) < len(given) or not all(
                type(seed) is int and 0 <= seed < 2**63 for seed in given):
            raise ValueError(f'{self.mode}_cfg.seeds={seeds!r} must be a number of seeds, at least 1, or a list of '
                             'different whole numbers from 0.')
        return list(given)

    def _checked_variants(self, variants: Sequence[str] | None) -> tuple[str, ...]:
        there = self.runner.bare_model.variants
        if variants is None:
            return self.defaults(there)
        names = [variants] if isinstance(variants, str) else list(variants)
        for name in names:
            if name not in VARIANTS:
                raise ValueError(f"{self.mode}_cfg.variants: '{name}' is not known; choose of "
                                 f'{", ".join(map(repr, VARIANTS))}.')
            if name not in there:
                raise ValueError(f"{self.mode}_cfg.variants names 'adapted', but the model has no adapters; its own "
                                 "pictures are 'base'.")
        if not names:
            raise ValueError(f'{self.mode}_cfg.variants is empty; leave it out, or choose of '
                             f'{", ".join(map(repr, VARIANTS))}.')
        return tuple(name for name in there if name in names)

    def _finite(self, dataloader: Any) -> Any:
        """The loader's config, with a sampler that gives each row once."""
        if not isinstance(dataloader, Mapping):
            return dataloader
        key, config = f'{self.mode}_dataloader', dict(copy.deepcopy(dataloader))
        if config.get('drop_last'):
            raise ValueError(f'{key}.drop_last=True would leave samples out; an evaluation takes all of them.')
        sampler = config.get('sampler') or {'type': f'{SCOPE}.FiniteSampler'}
        if isinstance(sampler, Mapping) and str(sampler.get('type')).split('.')[-1] != 'FiniteSampler':
            raise ValueError(f"{key}.sampler is {sampler.get('type')}; an evaluation takes each sample once, in order: "
                             'leave `sampler` out, or take FiniteSampler.')
        return {'batch_size': 1, **config, 'sampler': sampler}

    def _check_data(self) -> None:
        key, data = f'{self.mode}_dataloader', self.dataloader.dataset
        if isinstance(data, torch.utils.data.IterableDataset):
            raise ValueError(f'{key}.dataset is a stream; an evaluation needs data of known length. Take HFDataset, '
                             'with max_samples if it is large.')
        if not isinstance(self.dataloader.sampler, FiniteSampler):
            raise ValueError(f'{key} must read with a FiniteSampler, which takes each sample once.')
        if len(data) == 0:
            raise ValueError(f'{key}.dataset is empty: there is nothing to evaluate.')
        if getattr(data, 'on_bad_image', 'raise') == 'skip':
            raise ValueError(f"{key}.dataset.on_bad_image='skip' would count the next sample twice in place of an "
                             "unreadable one; an evaluation needs 'raise', and the bad file taken out.")

    @property
    def num_pictures_here(self) -> int:
        """Pictures that this process makes in one run."""
        return len(self.dataloader.sampler) * len(self.seeds) * len(self.variants)

    @torch.no_grad()
    def check(self) -> None:
        """Find out before anything is trained whether the first sample can be made into a picture.

        Raises:
            ValueError: an adapter finds no input, the size cannot be divided, or the data cannot be read.
        """
        first = next(iter(self.dataloader.sampler), None)
        if first is None:
            return
        batch = self._batch(collate([self.dataloader.dataset[first]]))
        model = self.runner.bare_model
        try:
            picture_size(batch, model)
            model.encode(batch)
        except ValueError as error:
            raise ValueError(f'{self.mode}_dataloader: {error}') from error

    def run(self) -> report.Numbers:
        """Make all pictures, compute the metrics, report."""
        runner, model, shown = self.runner, self.runner.bare_model, []
        training = model.training
        self._hook('before_{}')
        self._hook('before_{}_epoch')
        model.eval()
        try:
            with torch.no_grad(), rng.fork(runner.seed, 'evaluation', self.mode), runner.exported_weights(), \
                    closing(self._batches()) as batches:
                for index, data in enumerate(batches):
                    shown += self.run_iter(index, data)
                flat = self._metrics()
        finally:
            model.train(training)
        numbers = report.grouped(flat, self.variants)
        self._hook('after_{}_epoch', metrics=flat)
        self._hook('after_{}')
        self._report(numbers, shown)
        return numbers

    def _batches(self) -> Generator[Any, None, None]:
        iterator: Any = iter(self.dataloader)
        try:
            yield from iterator
        finally:
            # Left to the garbage collector, each worker of a loader that failed takes 5 s to go.
            if hasattr(iterator, '_shutdown_workers') and not self.dataloader.persistent_workers:
                iterator._shutdown_workers()

    def run_iter(self, index: int, data: Mapping[str, Any]) -> list[report.Shown]:
        """The pictures of one batch, for every seed, to the metrics; those for the contact sheet are returned."""
        self._hook('before_{}_iter', batch_idx=index, data_batch=data)
        batch, outputs = self._batch(data), []
        for seed in self.seeds:
            inputs = replace(batch, seed=torch.full((len(batch),), seed, dtype=torch.int64))
            samples = self.runner.bare_model(inputs, mode='predict', variants=self.variants)
            for sample in samples:
                sample['images'] = {variant: image.cpu() for variant, image in sample['images'].items()}
            self.evaluator.process(data_samples=samples, data_batch=data)
            outputs.append(samples)
        self._hook('after_{}_iter', batch_idx=index, data_batch=data, outputs=[s for made in outputs for s in made])
        return self._shown(index, batch, outputs)

    def _batch(self, data: Mapping[str, Any]) -> Batch:
        """On the device. What training drops at random belongs to training."""
        return replace(self.runner.bare_model.data_preprocessor(data)['inputs'], drop={})

    def _metrics(self) -> dict[str, Any]:
        world = get_world_size()
        for metric in getattr(self.evaluator, 'metrics', ()):
            if world > 1 and metric.collect_device == 'cpu' and metric.collect_dir is None:
                # mmengine would leave a folder where the command was started.
                metric.collect_dir = str(Path(self.runner.work_dir) / f'.{self.mode}.part')
        # It cuts the results to this number, for samplers that fill up; ours does not, and there may be many a sample.
        return self.evaluator.evaluate(sys.maxsize)

    def _shown(self, index: int, batch: Batch, outputs: list[list[dict[str, Any]]]) -> list[report.Shown]:
        rank, world = get_dist_info()
        rows = []
        for i in range(len(batch)):
            place = rank + world * (index * self.dataloader.batch_size + i)
            if place >= self.num_pictures:
                break
            pictures = {name: to_pil(image[i].float().cpu().numpy()) for name, image in _pictures(batch).items()}
            for samples, seed in list(zip(outputs, self.seeds, strict=True))[:report.MAX_SEEDS]:
                for variant, image in samples[i]['images'].items():
                    pictures[self._column(variant, seed)] = to_pil(image.float().numpy())
            rows.append(report.Shown(place, batch.text[i], pictures))
        return rows

    def _column(self, variant: str, seed: int) -> str:
        return variant if len(self.seeds) == 1 else f'{variant}, seed {seed}'

    def _report(self, numbers: report.Numbers, shown: list[report.Shown]) -> None:
        """Table, JSON and contact sheet, by the main process."""
        gathered = [row for rows in all_gather_object(shown) for row in rows]
        if not is_main_process():
            return
        runner, step = self.runner, self.step
        count = f'{len(self.dataloader.dataset)} samples' + (
            f' x {len(self.seeds)} seeds' if len(self.seeds) > 1 else '')
        title = f'{self.said()}, {count}'
        path = self.path()
        report.save(path, numbers)
        text = f'{title}\n{report.table(numbers)}'
        runner.logger.info(text)  # of more than a line: to the log file
        print(f'\n{text}\n', flush=True)
        runner.visualizer.add_scalars({f'{self.mode}/{variant}/{name}': found['value']
                                       for variant, metrics in numbers.items() for name, found in metrics.items()
                                       if found['value'] is not None}, step=step)
        runner.logger.info(f"Metrics: '{path}'")
        if gathered:
            columns = list(dict.fromkeys(column for row in gathered for column in row.pictures))
            image = report.sheet(gathered, columns, title)
            path = Path(runner.work_dir) / self.mode / 'pictures.png'
            with checkpoint.replacing(path) as temporary:
                image.save(temporary, format='PNG')
            runner.visualizer.add_image(f'{self.mode}_pictures', np.asarray(image), step=step)
            runner.logger.info(f"Pictures: '{path}'")

    @property
    def step(self) -> int:
        """The optimizer step that the weights are of; 0 if that is not known."""
        return self.runner.iter or self.runner.loaded_step or 0

    def said(self) -> str:
        """What is evaluated, in words."""
        if self.runner.iter > 0:
            return f'step {self.step}{", EMA weights" if self.runner.ema is not None else ""}'
        return self.runner.loaded or ('the weights of the config' if self.runner.bare_model.adapters else
                                      'the base alone')

    def path(self) -> Path:
        """Where the JSON goes."""
        raise NotImplementedError

    def _hook(self, name: str, **kwargs: Any) -> None:
        self.runner.call_hook(name.format(self.mode), **kwargs)


@LOOPS.register_module()
class ValLoop(EvalLoop):
    """An evaluation every `train_cfg.val_interval` optimizer steps and at the end, to `val/step<N>.json`."""

    mode = 'val'

    def defaults(self, variants: tuple[str, ...]) -> tuple[str, ...]:
        """The model as it stands: a frozen base alone gives the same every time."""
        return variants[-1:]

    def path(self) -> Path:
        """One for each step."""
        return self.folder(self.runner.work_dir) / f'step{self.step}.json'

    @staticmethod
    def folder(work_dir: str | Path) -> Path:
        """Where the results of a run's validations lie."""
        return Path(work_dir) / 'val'

    def forget_after(self, step: int) -> None:
        """Remove the results of later steps, which an interrupted run left: they are made again."""
        if is_main_process():
            for later, path in report.step_files(self.folder(self.runner.work_dir)).items():
                if later > step:
                    path.unlink()


@LOOPS.register_module()
class TestLoop(EvalLoop):
    """The evaluation of `mim test`, to `metrics.json`."""

    mode = 'test'

    def path(self) -> Path:
        """One for each work_dir."""
        return Path(self.runner.work_dir) / 'metrics.json'


def _pictures(batch: Batch) -> dict[str, Tensor]:
    """The conditions that are pictures, [B, 1 or 3, H, W]."""
    return {name: x for name, x in batch.conditions.items() if x.dim() == 4 and x.shape[1] in (1, 3)}
