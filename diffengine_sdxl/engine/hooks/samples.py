"""Pictures while a model trains, through the same denoiser."""

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
from diffengine_sdxl.datasets.transforms.geometry import pair
from diffengine_sdxl.engine.inference.prompts import prompt_batch
from diffengine_sdxl.pictures import first_picture, labelled_grid, to_pil
from diffengine_sdxl.registry import HOOKS
from diffengine_sdxl.samplers.sampler import check_size


@HOOKS.register_module()
class SampleHook(Hook):
    """Every `interval` optimizer steps, a labelled grid `samples/step<N>.png`; also to the visualizer's backends.

    Made with the EMA weights if there is an EMA, with the same seeds every time, so that only training changes them.

    Args:
        interval: optimizer steps; None makes none.
        prompts: texts, one row of the grid each.
        conditions: adapter name -> images (paths or URLs), one for each prompt, or one for all.
        num_from_dataset: without prompts, take captions and conditions of the data set's first samples.
        num_images: pictures a prompt, each with a seed of its own.
        size: (height, width) or one number for both, in pixels.
        seed: of the first picture; the next ones count up.
        negative_prompt: one for all; None for the null text.
        at_start: also before the first step.
    """

    # After the checkpoint: pictures that fail must not cost the steps before them.
    priority = 'LOWEST'

    def __init__(self, interval: int | None = 500, prompts: Sequence[str] = (),
                 conditions: Mapping[str, Any] | None = None, num_from_dataset: int = 0, num_images: int = 4,
                 size: int | Sequence[int] = 1024, seed: int = 0, negative_prompt: str | None = None,
                 at_start: bool = False) -> None:
        if interval is not None and (not isinstance(interval, int) or interval < 1):
            raise ValueError(f'SampleHook: interval={interval!r} must be a whole number of at least 1, or None.')
        self.interval, self.num_images, self.seed, self.at_start = interval, num_images, seed, at_start
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.num_from_dataset = 0 if self.prompts else num_from_dataset
        self.batches: list[Any] = []
        self.size = pair(size)
        self.negative_prompt = negative_prompt
        self.conditions = {}
        for name, images in (conditions or {}).items():
            images = [images] if isinstance(images, str) else list(images)
            images = images * len(self.prompts) if len(images) == 1 else images
            if len(images) != len(self.prompts):
                raise ValueError(f"SampleHook: adapter '{name}' has {len(images)} images for {len(self.prompts)} "
                                 'prompts; give one for each, or one for all.')
            self.conditions[name] = images

    def before_train(self, runner: Any) -> None:
        """Read the images now, so that a wrong path stops the run before its first step."""
        if not self.interval or not (self.prompts or self.num_from_dataset) or not is_main_process():
            return
        model = runner.bare_model
        if model.sampler is None:
            raise ValueError('SampleHook makes pictures, but model.sampler is not set.')
        check_size(self.size, model.size_divisor)
        self.batches = self._from_prompts(model) if self.prompts else self._from_dataset(runner)
        try:
            with torch.no_grad():
                for batch in self.batches:  # an adapter without its image says so now, not at the first interval
                    model.encode(batch)
        except ValueError as error:
            hint = ' Give prompts their images in default_hooks.samples.conditions.' if self.prompts else ''
            raise ValueError(f'Sample pictures: {error}{hint}') from error
        if self.at_start and runner.iter == 0:
            self.draw(runner, 0)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Draw where the interval says so."""
        if self.interval and (runner.iter + 1) % self.interval == 0:
            if self.batches:
                self.draw(runner, runner.iter + 1)
            barrier()

    def draw(self, runner: Any, step: int) -> None:
        """Make the pictures and write the grid."""
        model, rows = runner.bare_model, []
        given = [name for name, a in model.adapters.items() if a.reads in self.batches[0].conditions]
        model.eval()
        with runner.exported_weights():
            for batch in self.batches:
                shown = [first_picture(batch.conditions[model.adapters[name].reads][0]) for name in given]
                for k in range(self.num_images):  # one by one: a batch of large pictures may not fit beside training
                    batch.seed = torch.tensor([self.seed + k])
                    made, = model(batch, mode='predict')[0]['images'].values()
                    shown.append(to_pil(made.float().cpu().numpy()))
                rows.append((batch.text[0], shown))
        model.train()
        columns = [*given, *(f'seed {self.seed + k}' for k in range(self.num_images))]
        grid = labelled_grid(rows, columns, f'step {step}{", EMA weights" if runner.ema is not None else ""}')
        folder = Path(runner.work_dir) / 'samples'
        folder.mkdir(exist_ok=True)
        grid.save(folder / f'step{step}.png')
        runner.visualizer.add_image('samples', np.asarray(grid), step=step)
        runner.logger.info(f"Samples: '{folder / f'step{step}.png'}'")

    def _from_prompts(self, model: Any) -> list[Any]:
        negative = None if self.negative_prompt is None else [self.negative_prompt]
        batches = []
        for i, prompt in enumerate(self.prompts):
            images = {name: [given[i]] for name, given in self.conditions.items()}
            batches.append(prompt_batch(model, [prompt], images, self.size, [self.seed], negative))
        return batches

    def _from_dataset(self, runner: Any) -> list[Any]:
        dataset = runner.train_dataloader.dataset
        if isinstance(dataset, torch.utils.data.IterableDataset):
            # Of a resumed stream too, the first ones: from its beginning, and not by way of the shuffle buffer.
            stream: Any = copy.copy(dataset)
            stream.start, stream.buffer_size = 0, 0
            samples = list(itertools.islice(iter(stream), self.num_from_dataset))
        else:
            samples = [dataset[Draw(i, 0, runner.seed)] for i in range(min(self.num_from_dataset, len(dataset)))]
            # Of a row of several samples (PriorPreservation) the first is what is learned.
            samples = [sample[0] if isinstance(sample, list) else sample for sample in samples]
        batches = [runner.bare_model.data_preprocessor(collate([sample]))['inputs'] for sample in samples]
        for batch in batches:
            # What training drops at random belongs to training.
            batch.size, batch.drop = self.size, {}
        return batches
