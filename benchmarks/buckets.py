"""Aspect-ratio buckets over many images: reading sizes, one epoch's order, and replaying a run to resume it.

python benchmarks/buckets.py [--images 100000]     a table; exit code 1 if an aim is missed
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from diffengine_sdxl.datasets import BucketSampler, CaptionFolder

#: Distinct images, which the files are hard links to.
SOURCES = 48
#: Seconds and MiB for 100,000 images on two cores.
AIMS = {'read sizes': 60.0, 'memory': 200.0}


def write_images(folder: Path, num: int) -> Path:
    """Write `num` images of 300 to 1,600 pixels a side: JPEG with and without EXIF, PNG and WebP."""
    draws = np.random.default_rng(0)
    sources = []
    for i in range(SOURCES):
        height, width = (int(side) for side in draws.integers(300, 1600, 2))
        noise = Image.fromarray(draws.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        path = folder / f'source{i}.{("jpg", "jpg", "png", "webp")[i % 4]}'
        exif = Image.Exif()
        exif[0x0112] = (1, 6, 8)[i % 3]
        noise.resize((width, height)).save(path, exif=exif)
        sources.append(path)
    images = folder / 'images'
    for i in range(num):
        source = sources[i % SOURCES]
        path = images / f'{i // 1000:03d}' / f'{i:06d}{source.suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, path)
    return images


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Return how long a call takes, and the processor time that it takes, in seconds."""
    began, used = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - used


def memory() -> float:
    """Return the most memory that this process has used, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=100000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), args.images)
        before = memory()
        dataset = CaptionFolder(images, default_caption='')
        rows: dict[str, tuple[float, float]] = {}
        built: list[BucketSampler] = []
        rows['read sizes'] = timed(lambda: built.append(BucketSampler(dataset, resolution=512, upscale=True,
                                                                      unfit='skip')))
        sampler = built[0]
        sampler.prepare(32, 8)
        rows['first batch'] = timed(lambda: list(islice(sampler, 32)))
        rows['one epoch'] = timed(lambda: list(islice(sampler, len(sampler))))
        sampler.start = 100 * len(sampler) // 32 * 32
        rows['resume after 100 epochs'] = timed(lambda: list(islice(sampler, 32)))
        rise = memory() - before
    print(sampler.describe())
    print(f'{args.images:,} images, {os.cpu_count()} cores')
    for name, (seconds, used) in rows.items():
        aim = f'   aim {AIMS[name]:g} s' if name in AIMS else ''
        print(f'  {name:<26} {seconds:8.2f} s {used:8.2f} s of processor time{aim}')
    print(f'  {"memory":<26} {rise:8.0f} MiB   aim {AIMS["memory"]:g} MiB')
    return int(rows['read sizes'][0] > AIMS['read sizes'] or rise > AIMS['memory'])


if __name__ == '__main__':
    sys.exit(main())
