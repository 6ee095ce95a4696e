"""Sample images while a model trains."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from PIL import Image
from torch import Tensor

from diffengine_sdxl.config.references import to_plain
from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.datasets.transforms.geometry import height_width
from diffengine_sdxl.engine.eval_images import IGNORED_MODEL_KEYS
from diffengine_sdxl.engine.hooks.step_grid import StepGrid
from diffengine_sdxl.engine.run_summary import every
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, whole_number
from diffengine_sdxl.images import first_image, labelled_grid, to_pil
from diffengine_sdxl.models.request_batch import request_batch
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import HOOKS
from diffengine_sdxl.request import Request
from diffengine_sdxl.samplers.sampler import check_size
from diffengine_sdxl.structures import Batch

#: Bytes that making one image of 1024 x 1024 pixels takes beside the weights, with guidance and an fp32 VAE, whose last
#: block takes most of it: estimated, not measured.
BYTES_PER_IMAGE = 6 * 2**30


@HOOKS.register_module()
class SampleHook(Hook):
    """Every `interval` optimizer steps, write a labelled grid `samples/step<N>.png`, also to the visualizer.

    The weights are the EMA's if there is an EMA. The seeds are the same every time, so only training changes the
    images. `samples/images/` keeps them, of at most about twenty steps beside those with an export, evenly chosen;
    `samples/steps.png` shows the first seed's over the steps.

    Args:
        interval: optimizer steps; None for no images.
        prompts: texts, one row of the grid each.
        conditions: adapter name -> images (paths or URLs), one for each prompt, or one for all.
        num_from_dataset: without prompts, use captions and conditions of the data set's first samples; with buckets
            their images have the buckets' sizes.
        num_images: images per prompt, each with its own seed.
        size: (height, width) or one number for both, in pixels.
        seed: of the first image; the following ones count up.
        negative_prompt: one for all; None for the null text.
        at_start: also before the first step.
        base: also make the first seed's images without the adapters, once, for `samples/steps.png`.
        batch_size: images of one prompt that are made at once; above 1 the last bits may differ. 'auto': on CUDA as
            many as its free memory holds, elsewhere 1. If it does not suffice after all, they are made one by one.
    """

    # After the checkpoint, so that images that fail don't cost the steps before them.
    priority = 'LOWEST'

    def __init__(self, interval: int | None = 500, prompts: str | Sequence[str] = (),
                 conditions: Mapping[str, Any] | None = None, num_from_dataset: int = 0, num_images: int = 4,
                 size: int | Sequence[int] = 1024, seed: int = 0, negative_prompt: str | None = None,
                 at_start: bool = False, batch_size: int | str = 'auto', base: bool = True) -> None:
        self.interval = None if interval is None else whole_number('SampleHook: interval', interval, 1)
        self.num_images = whole_number('SampleHook: num_images', num_images, 1)
        self.seed = whole_number('SampleHook: seed', seed)
        self.batch_size = batch_size if batch_size == 'auto' else whole_number('SampleHook: batch_size', batch_size, 1)
        self.seconds = 0.0
        self.at_start, self.negative_prompt, self.base = at_start, negative_prompt, base
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.num_from_dataset = 0 if self.prompts else whole_number('SampleHook: num_from_dataset', num_from_dataset, 0)
        self.size = height_width(size)
        self.batches: list[Batch] = []
        self.conditions: dict[str, list[Any]] = {}
        for name, images in (conditions or {}).items():
            images = [images] if isinstance(images, str) else list(images)
            images = images * len(self.prompts) if len(images) == 1 else images
            if len(images) != len(self.prompts):
                raise UserError(f"SampleHook: adapter '{name}' has {len(images)} images for {len(self.prompts)} "
                                'prompts; give one for each, or one for all.')
            self.conditions[name] = images

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training, if there will be images."""
        if not self.interval or not (self.prompts or self.num_from_dataset):
            return {}
        at_start = ' and before the first' if self.at_start and runner.iter == 0 else ''
        rows = f'{len(self.prompts)} prompts' if self.prompts else f'{self.num_from_dataset} rows of the data'
        return {'samples': f'samples/step<N>.png {every(self.interval)}{at_start}: {rows} x {self.num_images} seeds, '
                           f'{self.size[0]} x {self.size[1]} pixels'}

    def before_train(self, runner: ExperimentRunner) -> None:
        """Read the images, so that a wrong path stops the run before its first step."""
        if not self.interval or not (self.prompts or self.num_from_dataset) or not is_main_process():
            return
        self.started = time.perf_counter()
        model = runner.bare_model
        if model.sampler is None:
            raise UserError('SampleHook makes images, but model.sampler is not set.')
        check_size(self.size, model.size_divisor)
        self.batches = self._from_prompts(model) if self.prompts else self._from_dataset(runner)
        try:
            with torch.no_grad():
                for batch in self.batches:  # refuses an adapter without its image now, not at the first interval
                    model.encode(batch)
        except UserError as error:
            hint = ' Set default_hooks.samples.conditions.' if self.prompts else ''
            raise UserError(f'SampleHook: {error}{hint}') from error
        made_by = to_plain({key: value for key, value in runner.resolved.model.items()
                            if key not in IGNORED_MODEL_KEYS})
        self.grid = StepGrid(Path(runner.work_dir) / 'samples', self.batches, self.seed, made_by)
        self.grid.remove_after(runner.iter)
        if self.at_start and runner.iter == 0:
            self.draw(runner, 0)

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Draw at the interval."""
        if self.interval and (runner.iter + 1) % self.interval == 0:
            runner.settle()  # in all processes: a step that is not finite stops the run before it is drawn
            if self.batches:
                self.draw(runner, runner.iter + 1)
            barrier()

    def at_stop(self, runner: ExperimentRunner, step: int) -> None:
        """Draw at the end of a training that ends early, unless the interval has."""
        if self.interval and step % self.interval:
            if self.batches:
                self.draw(runner, step)
            barrier()

    def draw(self, runner: ExperimentRunner, step: int) -> None:
        """Make the images and write the grids."""
        model, rows, began = runner.bare_model, [], time.perf_counter()
        conditions = {name: adapter.condition_key for name, adapter in model.adapters.items()
                      if adapter.condition_key in self.batches[0].conditions}
        model.eval()
        with runner.exported_weights():
            for row, batch in enumerate(self.batches):
                shown, images = [first_image(batch.conditions[key][0]) for key in conditions.values()], []
                for k, image in enumerate(self._images(model, batch)):
                    self.grid.save(image, f'step{step}', row, self.seed + k)
                    images.append(image)
                rows.append((batch.text[0], [*shown, *images]))
                # A base that trains is not what it was.
                if self.base and 'adapted' in model.image_sets and not model.trainable_parts and not (
                        self.grid.read('base', row)):
                    base, = self._images(model, batch, ('base',), 1)
                    self.grid.save(base, 'base', row, self.seed)
        model.train()
        columns = [*conditions, *(f'seed {self.seed + k}' for k in range(self.num_images))]
        grid = labelled_grid(rows, columns, f'step {step}{", EMA weights" if runner.ema is not None else ""}')
        path = Path(runner.work_dir) / 'samples' / f'step{step}.png'
        grid.save(path)
        self.grid.draw([row[:len(conditions)] for _, row in rows], list(conditions))
        self.grid.thin_out()
        runner.visualizer.add_image('samples', np.asarray(grid), step=step)
        now = time.perf_counter()
        self.seconds += now - began
        runner.logger.info(f"Samples: '{path}' took {now - began:.1f} s; samples took "
                           f'{self.seconds / (now - self.started):.1%} of the training time so far.')

    def _images(self, model: SDXL, batch: Batch, image_sets: Sequence[str] | None = None,
                num_images: int | None = None) -> list[Image.Image]:
        """Return the images of one prompt, by default `num_images` of the model as it stands."""
        images: list[Image.Image] = []
        total = num_images or self.num_images
        sets = {} if image_sets is None else {'image_sets': image_sets}
        while len(images) < total:
            num, first = min(self._number_at_once(model.device), total - len(images)), self.seed + len(images)
            try:
                samples = model(replace(_repeated(batch, num), seed=torch.arange(first, first + num)), mode='predict',
                                **sets)
            except torch.OutOfMemoryError:
                if num == 1:
                    raise
                self.batch_size = 1
                continue
            images += [to_pil(image.float().cpu().numpy()) for sample in samples for image in sample['images'].values()]
        return images

    def _number_at_once(self, device: torch.device) -> int:
        if isinstance(self.batch_size, int):
            return self.batch_size
        if device.type != 'cuda':
            return 1
        free = torch.cuda.mem_get_info(device)[0]
        # What torch holds and training does not use is free, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(1, int(free / (BYTES_PER_IMAGE * self.size[0] * self.size[1] / 2**20)))

    def _from_prompts(self, model: SDXL) -> list[Batch]:
        requests = [Request(prompt=prompt, negative_prompt=self.negative_prompt, seed=self.seed,
                            conditions={name: images[i] for name, images in self.conditions.items()})
                    for i, prompt in enumerate(self.prompts)]
        return [request_batch(model, [request], self.size) for request in requests]

    def _from_dataset(self, runner: ExperimentRunner) -> list[Batch]:
        dataset: Any = runner.train_dataloader.dataset
        # Dropping captions and conditions at random is for training.
        dataset = dataset.without_drops() if hasattr(dataset, 'without_drops') else dataset
        sizes: Iterable[tuple[int, int] | None]
        if isinstance(dataset, torch.utils.data.IterableDataset):
            # The stream's first samples, also in a resumed run: from its start, without the shuffle buffer.
            stream: Any = copy.copy(dataset)
            stream.start, stream.buffer_size = 0, 0
            samples, sizes = list(itertools.islice(iter(stream), self.num_from_dataset)), itertools.repeat(None)
        else:
            sampler: Any = runner.train_dataloader.sampler
            draw = getattr(sampler, 'draw', lambda index: Draw(index, 0, runner.seed))
            draws = [draw(i) for i in range(min(self.num_from_dataset, len(dataset)))]
            # Of several samples in a row (PriorPreservation) the first is the one to learn.
            samples = [sample[0] if isinstance(sample, list) else sample for sample in map(dataset.__getitem__, draws)]
            sizes = [draw.size for draw in draws]
        batches = [runner.bare_model.data_preprocessor(collate([sample]))['inputs'] for sample in samples]
        for batch, size in zip(batches, sizes, strict=False):
            # With buckets, conditions have the bucket's size. A user's own transform may drop conditions, too.
            batch.size, batch.drop = size or self.size, {}
        return batches


def _repeated(batch: Batch, num: int) -> Batch:
    """Return a batch of `num` times the one sample of `batch`; of 1, with the same tensors."""
    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if num == 1 else value.repeat_interleave(num, dim=0)
        if isinstance(value, Mapping):
            return {k: repeat(v) for k, v in value.items()}
        return value * num if isinstance(value, list) else value
    return replace(batch, **{f.name: repeat(getattr(batch, f.name)) for f in fields(batch)})
