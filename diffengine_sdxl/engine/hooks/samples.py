"""Sample images while a model trains."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook

from diffengine_sdxl.datasets import Draw, collate
from diffengine_sdxl.datasets.transforms.geometry import height_width
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


@HOOKS.register_module()
class SampleHook(Hook):
    """Every `interval` optimizer steps, write a labelled grid `samples/step<N>.png`, also to the visualizer.

    The weights are the EMA's if there is an EMA. The seeds are the same every time, so only training changes the
    images.

    Args:
        interval: optimizer steps; None for no images.
        prompts: texts, one row of the grid each.
        conditions: adapter name -> images (paths or URLs), one for each prompt, or one for all.
        num_from_dataset: without prompts, use captions and conditions of the data set's first samples.
        num_images: images per prompt, each with its own seed.
        size: (height, width) or one number for both, in pixels.
        seed: of the first image; the following ones count up.
        negative_prompt: one for all; None for the null text.
        at_start: also before the first step.
    """

    # After the checkpoint, so that images that fail don't cost the steps before them.
    priority = 'LOWEST'

    def __init__(self, interval: int | None = 500, prompts: str | Sequence[str] = (),
                 conditions: Mapping[str, Any] | None = None, num_from_dataset: int = 0, num_images: int = 4,
                 size: int | Sequence[int] = 1024, seed: int = 0, negative_prompt: str | None = None,
                 at_start: bool = False) -> None:
        self.interval = None if interval is None else whole_number('SampleHook: interval', interval, 1)
        self.num_images = whole_number('SampleHook: num_images', num_images, 1)
        self.seed = whole_number('SampleHook: seed', seed)
        self.at_start, self.negative_prompt = at_start, negative_prompt
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
        if self.at_start and runner.iter == 0:
            self.draw(runner, 0)

    def after_train_iter(self, runner: ExperimentRunner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Draw at the interval."""
        if self.interval and (runner.iter + 1) % self.interval == 0:
            if self.batches:
                self.draw(runner, runner.iter + 1)
            barrier()

    def draw(self, runner: ExperimentRunner, step: int) -> None:
        """Make the images and write the grid."""
        model, rows = runner.bare_model, []
        conditions = {name: adapter.condition_key for name, adapter in model.adapters.items()
                      if adapter.condition_key in self.batches[0].conditions}
        model.eval()
        with runner.exported_weights():
            for batch in self.batches:
                images = [first_image(batch.conditions[key][0]) for key in conditions.values()]
                for k in range(self.num_images):  # one by one: a batch of large images may not fit beside training
                    batch.seed = torch.tensor([self.seed + k])
                    image, = model(batch, mode='predict')[0]['images'].values()
                    images.append(to_pil(image.float().cpu().numpy()))
                rows.append((batch.text[0], images))
        model.train()
        columns = [*conditions, *(f'seed {self.seed + k}' for k in range(self.num_images))]
        grid = labelled_grid(rows, columns, f'step {step}{", EMA weights" if runner.ema is not None else ""}')
        path = Path(runner.work_dir) / 'samples' / f'step{step}.png'
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
        runner.visualizer.add_image('samples', np.asarray(grid), step=step)
        runner.logger.info(f"Samples: '{path}'")

    def _from_prompts(self, model: SDXL) -> list[Batch]:
        requests = [Request(prompt=prompt, negative_prompt=self.negative_prompt, seed=self.seed,
                            conditions={name: images[i] for name, images in self.conditions.items()})
                    for i, prompt in enumerate(self.prompts)]
        return [request_batch(model, [request], self.size) for request in requests]

    def _from_dataset(self, runner: ExperimentRunner) -> list[Batch]:
        dataset: Any = runner.train_dataloader.dataset
        # Dropping captions and conditions at random is for training.
        dataset = dataset.without_drops() if hasattr(dataset, 'without_drops') else dataset
        if isinstance(dataset, torch.utils.data.IterableDataset):
            # The stream's first samples, also in a resumed run: from its start, without the shuffle buffer.
            stream: Any = copy.copy(dataset)
            stream.start, stream.buffer_size = 0, 0
            samples = list(itertools.islice(iter(stream), self.num_from_dataset))
        else:
            samples = [dataset[Draw(i, 0, runner.seed)] for i in range(min(self.num_from_dataset, len(dataset)))]
            # Of several samples in a row (PriorPreservation) the first is the one to learn.
            samples = [sample[0] if isinstance(sample, list) else sample for sample in samples]
        batches = [runner.bare_model.data_preprocessor(collate([sample]))['inputs'] for sample in samples]
        for batch in batches:
            # A user's own transform may drop conditions, too.
            batch.size, batch.drop = self.size, {}
        return batches
