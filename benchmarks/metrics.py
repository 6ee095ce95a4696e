"""Time five metrics on images of the shapes data, apart from the drawing of the images.

    python benchmarks/metrics.py [--samples 100] [--threads 2]

Each sample has two images, of the image sets 'base' and 'adapted': the sample's own with much and with little noise.
The metrics are fill accuracy, mask IoU, CLIP-I and KID over the shapes base's image encoder, SSIM; intervals are of
both sets and of their difference. What the metrics import and load counts; what a test imports for the model does not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from diffengine_sdxl.datasets import collate
from diffengine_sdxl.models import sdxl  # noqa: F401  (what a test has imported)
from diffengine_sdxl.models.data_preprocessor import images_to_floats
from diffengine_sdxl.registry import DATASETS, METRICS

ENCODER = dict(model='diffengine_sdxl::shapes/base', subfolder='image_encoder')
METRIC_CONFIGS = (dict(type='FillAccuracy'), dict(type='MaskIoU'), dict(type='CLIPImage', **ENCODER),
                  dict(type='KID', **ENCODER), dict(type='SSIM'))
BATCH_SIZE = 40
#: Standard deviations of the noise on the images.
NOISE = {'base': 0.3, 'adapted': 0.05}


def draw(num_samples: int) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return batches as a test's data loader collates them, and the images of their samples in 8 bits."""
    data: Any = DATASETS.build(dict(type='Shapes', split='test', length=num_samples, truth=True,
                                    transforms=[dict(type='ComputeTimeIds'), dict(type='PackInputs')]))
    generator, batches = torch.Generator().manual_seed(0), []
    for start in range(0, num_samples, BATCH_SIZE):
        batch = images_to_floats(collate([data[i] for i in range(start, min(start + BATCH_SIZE, num_samples))]))
        own = (batch['img'] + 1) / 2
        images = {name: own + noise * torch.randn(own.shape, generator=generator) for name, noise in NOISE.items()}
        images = {name: image.clamp(0, 1).mul(255).round().div(255) for name, image in images.items()}
        batches.append((batch, [dict(key=key, seed=0, images={name: x[i] for name, x in images.items()})
                                for i, key in enumerate(batch['key'])]))
    return batches


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Print a table; return seconds by the metric's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, default=100)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    batches, seconds = draw(args.samples), {}
    drawn = time.perf_counter() - start
    print('| metric | measure | intervals | CPU time |\n|---|---|---|---|')
    for config in METRIC_CONFIGS:
        start, cpu = time.perf_counter(), time.process_time()
        metric: Any = METRICS.build(config)
        metric.check(args.samples, 1)
        for batch, samples in batches:
            metric.process(batch, samples)
        measured = time.perf_counter()
        metric.evaluate(args.samples)
        seconds[metric.name] = time.perf_counter() - start
        print(f'| {metric.name} | {measured - start:.2f} s | {time.perf_counter() - measured:.2f} s '
              f'| {time.process_time() - cpu:.2f} s |', flush=True)
    print(f'\n{2 * args.samples} images of {args.samples} samples: {sum(seconds.values()):.1f} s with {args.threads} '
          f'threads, without the drawing of the images ({drawn:.1f} s).')
    return seconds


if __name__ == '__main__':
    main()
