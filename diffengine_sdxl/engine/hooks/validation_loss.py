"""The loss on data that is held out, at fixed timesteps with fixed noise."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, barrier, get_dist_info, is_main_process
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from diffengine_sdxl import atomic_files, rng
from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.engine.eval_loop import shut_down_workers
from diffengine_sdxl.engine.hooks.curves import VAL_LOSS, read_rows
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.run_summary import every
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.objectives.denoise import denoise, mask_of_latents
from diffengine_sdxl.registry import DATASETS, HOOKS
from diffengine_sdxl.structures import Batch, send


@HOOKS.register_module()
class ValidationLoss(Hook):
    """Measure the mean squared error of the prediction on held-out data, by the weights that train and by the EMA's.

    Timesteps are given, and noise, the VAE's draw, crops and random captions depend on (seed, sample key, timestep)
    only: losses compare from step to step and from run to run, for any number of processes, bitwise for an equal
    `batch_size`. Conditions are not dropped, and neither the objective's loss nor its weighting counts, but a LossMask
    of the data does. Weights, mode and random state of the training are left as they are.

    Args:
        dataset: config of a data set of numbered rows; of a Mixture each set has a loss too.
        timesteps: at which each sample is measured, 0 <= t < T.
        interval: optimizer steps between validations; None: at the end only, which is always done.
        batch_size, num_workers: of its data loader.
        seed: of all draws.
        max_samples: of each set, its first ones; None for all.
        at_start: also before the first step.

    Raises:
        UserError: a number is out of range, or the data set cannot be used.
    """

    # After the checkpoint, so that data that cannot be read doesn't cost the steps before.
    priority = 'LOWEST'

    def __init__(self, dataset: Mapping[str, Any], timesteps: Sequence[int] = (100, 300, 500, 700, 900),
                 interval: int | None = 500, batch_size: int = 4, num_workers: int = 0, seed: int = 0,
                 max_samples: int | None = None, at_start: bool = True) -> None:
        self.config, self.at_start = dataset, at_start
        self.interval = None if interval is None else whole_number('ValidationLoss: interval', interval, 1)
        self.batch_size = whole_number('ValidationLoss: batch_size', batch_size, 1)
        self.num_workers = whole_number('ValidationLoss: num_workers', num_workers, 0)
        self.seed = whole_number('ValidationLoss: seed', seed, 0)
        self.max_samples = None if max_samples is None else whole_number('ValidationLoss: max_samples', max_samples, 1)
        self.timesteps = [whole_number('ValidationLoss: timesteps', t, 0) for t in timesteps]
        if not self.timesteps or len(set(self.timesteps)) < len(self.timesteps):
            raise UserError(f'ValidationLoss: timesteps={list(timesteps)} must be one or more different numbers.')
        self.seconds = 0.0
        #: Steps that were measured.
        self.done: set[int] = set()

    def before_run(self, runner: ExperimentRunner) -> None:
        """Build the data set.

        Raises:
            UserError: it is a stream, empty, or would replace unreadable images; or the model cannot be measured.
        """
        model, data = runner.bare_model, DATASETS.build(dict(self.config))
        num = model.schedule.num_train_timesteps
        if late := [t for t in self.timesteps if t >= num]:
            raise UserError(f'ValidationLoss: timesteps has {late[0]}; the base has {num}, from 0 to {num - 1}.')
        if getattr(model.objective, 'reads_images', True):
            raise UserError('ValidationLoss measures how well the model denoises, which '
                            f'{type(model.objective).__name__} does not train. Remove the hook.')
        data = data.without_drops() if hasattr(data, 'without_drops') else data
        self.sets: dict[str, Any] = getattr(data, 'sets', {'': data})
        for name, dataset in self.sets.items():
            of = f"ValidationLoss: the data set{f' {name!r}' if name else ''}"
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__') or len(dataset) == 0:
                raise UserError(f'{of} must have numbered rows, at least one; a stream has none.')
            if getattr(dataset, 'on_bad_image', 'raise') == 'skip':
                raise UserError(f"{of} has on_bad_image='skip', which would count another sample in place of an "
                                "unreadable one; set 'raise' and take the bad file out.")

    def _num_rows(self, name: str) -> int:
        return min(len(self.sets[name]), self.max_samples or len(self.sets[name]))

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training."""
        start = ' and before the first' if self.at_start and runner.iter == 0 else ''
        return {'val/loss': f'{VAL_LOSS} {every(self.interval, at_end=True)}{start}: '
                            f'{sum(map(self._num_rows, self.sets)):,} samples at {len(self.timesteps)} timesteps'}

    def before_train(self, runner: ExperimentRunner) -> None:
        """Validate before the first step; after a resume, if the validation of the checkpoint's step is missing."""
        self.started = time.perf_counter()
        for dataset in self.sets.values():
            runner.attach_cache(dataset)
        self.done = on_main_process(lambda: _keep_rows(Path(runner.work_dir) / VAL_LOSS, runner.iter))
        due = self._due(runner.iter, runner.max_iters) if runner.iter else self.at_start
        if due and runner.iter not in self.done:
            self.validate(runner, runner.iter)

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Validate at the interval and at the end."""
        if self._due(runner.iter + 1, runner.max_iters):
            self.validate(runner, runner.iter + 1)

    def at_stop(self, runner: ExperimentRunner, step: int) -> None:
        """Validate at the end of a training that ends early."""
        if step not in self.done:
            self.validate(runner, step)

    def loss_names(self, runner: ExperimentRunner) -> list[str]:
        """Return the names of the losses that `measure` returns."""
        which = ['val/loss'] if runner.ema is None else ['val/loss', 'val/loss_ema']
        return [f'{loss}{of}' for of in ('', *(f'/{name}' for name in self.sets if name)) for loss in which]

    def _due(self, step: int, last: int) -> bool:
        return step == last or bool(self.interval and step % self.interval == 0)

    def validate(self, runner: ExperimentRunner, step: int) -> None:
        """Measure the losses, and write them in the main process: log, visualizer, `val_loss.jsonl`."""
        began = time.perf_counter()
        runner.settle()  # in all processes: a step that is not finite stops the run before it is measured
        losses = self.measure(runner)
        self.done.add(step)
        now = time.perf_counter()
        self.seconds += now - began
        if is_main_process():
            with open(Path(runner.work_dir) / VAL_LOSS, 'a') as file:
                file.write(json.dumps({'step': step, **losses}) + '\n')
            runner.visualizer.add_scalars(losses, step=step)
            runner.logger.info(f'Validation at step {step}: '
                               f'{", ".join(f"{name} {value:.4f}" for name, value in losses.items())}; it took '
                               f'{now - began:.1f} s; validation losses took '
                               f'{self.seconds / (now - self.started):.1%} of the training time so far.')
        barrier()

    def measure(self, runner: ExperimentRunner) -> dict[str, float]:
        """Return the losses in all processes: 'val/loss', 'val/loss_ema', and 'val/loss/<set>' of several sets.

        Each is the mean over samples and timesteps.
        """
        model, found = runner.bare_model, dict[str, list[float]]()
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), rng.fork(self.seed, 'validation_loss'), model.frozen():
                for name in self.sets:
                    with closing(self._batches(name)) as batches:
                        for collated in batches:
                            runner.keep_samples(collated)
                            batch = model.data_preprocessor(collated)['inputs']
                            keys = [f'{name}/{key}' for key in batch.key] if name else batch.key
                            # Nothing is dropped here; a dropped caption was looked up as ''.
                            lookups = {k: found for k, found in batch.lookups.items()
                                       if k != 'text' or 'text' not in batch.drop}
                            batch = replace(batch, drop={}, key=keys, lookups=lookups)
                            for which, losses in self._losses(runner, batch).items():
                                for of in {'', f'/{name}' if name else ''}:
                                    found.setdefault(which + of, []).extend(losses)
        finally:
            model.train(training)
        everywhere = all_gather_object(found)
        names = sorted({key for process in everywhere for key in process}, key=lambda key: (key.count('/'), key))
        values = {key: [value for process in everywhere for value in process.get(key, ())] for key in names}
        # Exactly rounded, so that the order of the processes does not count.
        return {key: math.fsum(losses) / len(losses) for key, losses in values.items()}

    def _batches(self, name: str) -> Generator[dict[str, Any], None, None]:
        """Yield this process's batches of a set; which rows are in a batch does not depend on the processes."""
        rank, world = get_dist_info()
        rows = [range(self._num_rows(name))[first:first + self.batch_size]
                for first in range(0, self._num_rows(name), self.batch_size)]
        draws = [[Draw(row, 0, self.seed) for row in batch] for batch in rows[rank::world]]
        loaded = iter(DataLoader(self.sets[name], batch_sampler=draws, collate_fn=collate,  # type: ignore[arg-type]
                                 num_workers=self.num_workers))
        try:
            yield from loaded
        finally:
            shut_down_workers(loaded)

    def _losses(self, runner: ExperimentRunner, batch: Batch) -> dict[str, list[float]]:
        """Return the losses of the samples of a batch, by the weights that train and by the averages."""
        model = runner.bare_model
        latents = model.latents(batch)
        latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
        losses = {'val/loss': self._errors(model, batch, latents)}
        if runner.ema is not None:
            with runner.exported_weights():
                losses['val/loss_ema'] = self._errors(model, batch, latents)
        return {name: values.tolist() for name, values in losses.items()}

    def _errors(self, model: SDXL, batch: Batch, latents: Tensor) -> Tensor:
        """Return each sample's mean over the timesteps, fp64 [B]."""
        errors = []
        for timestep in self.timesteps:
            timesteps = torch.full((len(batch),), timestep, dtype=torch.int64)
            noise = rng.Draws(batch.seed, batch.key, timesteps).normal('validation_noise', latents.shape[1:])
            noise = send(noise, latents.device).to(latents.dtype)
            _, prediction, target = denoise(model, batch, latents, noise, noise, timesteps)
            error = (prediction - target).square()
            if batch.mask is not None:
                error = error * mask_of_latents(batch.mask, error)
            errors.append(error.mean(dim=(1, 2, 3)).double())
        return torch.stack(errors).mean(dim=0)


def _keep_rows(path: Path, step: int) -> set[int]:
    """Remove what an interrupted run wrote after `step`; return the steps that are there."""
    rows = [row for row in read_rows(path) if row['step'] <= step]
    if path.is_file():
        with atomic_files.replacing(path) as temporary:
            temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return {row['step'] for row in rows}
