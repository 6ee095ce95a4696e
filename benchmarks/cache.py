"""What caches save, what filling them costs, and whether a kill can spoil one.

python benchmarks/cache.py step [--pairs 15] [--block 5]   a T2I step from a warm cache over diffusers' recipe
python benchmarks/cache.py cold [--steps 50]               steps that fill a cache over steps without one
python benchmarks/cache.py kills [--kills 50] [--seed 0]   two processes fill and are killed; then every entry
python benchmarks/cache.py full-size                       full-size steps with and without a cache, counted

The first two are of a tiny SDXL on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

SIDE, SIZE = 128, 4


def step_config(folder: Path, num_images: int, **options: Any) -> Any:
    """Return a config that trains a T2I-Adapter on a tiny SDXL, wide enough for a step of 100 ms, from files."""
    from diffengine_sdxl import config, testing
    base, data = folder / 'base', folder / f'images{num_images}'
    if not base.exists():
        testing.write_tiny_sdxl(base, channels=(32, 64, 128))
    if not data.exists():
        testing.write_circles(data, num_images, SIDE)
    cfg = config.load('tiny_t2i_adapter', {
        'model.pretrained': str(base), 'train_dataloader.dataset.source': str(data), 'resolution': SIDE,
        'train_dataloader.batch_size': SIZE, 'train_dataloader.num_workers': 0, 'train_cfg.max_iters': 10**6,
        'default_hooks.samples': None, 'default_hooks.checkpoint': None, 'default_hooks.curves': None,
        'optim_wrapper.accumulative_counts': 1, 'log_level': 'ERROR', 'randomness.seed': 0, **options})
    cfg.visualizer = dict(type='Visualizer', vis_backends=[])
    cfg.work_dir = tempfile.mkdtemp(dir=folder)
    return cfg


def start(cfg: Any) -> tuple[Any, Iterator[Any]]:
    """Build a runner and do what `train` does before its first step; return it and its batches."""
    from train_step import begin

    from diffengine_sdxl.engine.prefetch import ahead
    from diffengine_sdxl.registry import RUNNERS
    runner = RUNNERS.build(cfg)
    if runner.cache is not None:
        runner.cache.attach(runner.train_dataloader.dataset, trains=True)
    begin(runner)
    return runner, ahead(iter(runner.train_dataloader), runner.bare_model.device, runner.keep_samples)


def fill(cfg: Any) -> None:
    """Fill the cache of a config."""
    from diffengine_sdxl.cache.store import Store
    from diffengine_sdxl.commands.cache import encode
    from diffengine_sdxl.config import resolve
    store = Store(cfg.cache)
    encode(resolve(cfg), store)
    store.close()


def timed(blocks: Mapping[str, Callable[[], Any]], pairs: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call two functions in turn, the first one first in every other pair; return CPU seconds of all threads."""
    rows: dict[str, list[float]] = {name: [] for name in blocks}
    for index in range(pairs + warm_up):
        for name in [*blocks] if index % 2 else [*blocks][::-1]:
            begun = time.process_time()
            blocks[name]()
            if index >= warm_up:
                rows[name].append(time.process_time() - begun)
    return rows


class FileRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images and conditions from the files, as the script's transforms make them, with text embedded ahead."""

    def __init__(self, source: Path, text: Mapping[str, Tensor], ids: Mapping[str, Tensor]) -> None:
        self.images = sorted((source / 'images').glob('*.png'))
        self.conditions = sorted((source / 'conditioning_images').glob('*.png'))
        time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * len(self.images), dtype=torch.float32)
        self.rows = {**text, **ids, 'time_ids': time_ids}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        img, condition = (self.read(paths[index]) for paths in (self.images, self.conditions))
        rows = {name: value[index] for name, value in self.rows.items()}
        return {**rows, 'img': (img - 0.5) / 0.5, 'conditioning_image': condition}

    @staticmethod
    def read(path: Path) -> Tensor:
        """Return an image in [0, 1], as torchvision's Resize, CenterCrop and ToTensor."""
        import numpy as np
        from PIL import Image
        with Image.open(path) as image:
            resized = image.convert('RGB').resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)


def measure_step(pairs: int, block: int) -> None:
    """Time steps from a warm cache and the recipe's in turn, after checking that both have the same loss."""
    from gpu_steps import build_recipe
    from workbench import Workbench
    print("| recipe | with a cache | recipe | ratio (median of pairs) | quartiles |\n|---|---|---|---|---|")
    for in_step in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bench = Workbench(folder, 'cpu', tiny=True, precision='no', resolution=SIDE, channels=(32, 64, 128))
            cfg = step_config(folder, 32)
            cfg.cache = str(folder / 'cache')
            fill(cfg)
            recipe = build_recipe(bench, 't2i')
            runner, ours = start(cfg)
            compare(runner, recipe)
            parts = bench.parts
            recipe.vae = parts['vae']
            data = file_rows(Path(cfg.train_dataloader.dataset.source), parts)
            recipe.text_encoders = [parts['text_encoder'], parts['text_encoder_2']] if in_step else None
            batches = forever(torch.utils.data.DataLoader(data, batch_size=SIZE, shuffle=True, drop_last=True))

            def cached(runner: Any = runner, ours: Any = ours) -> None:
                for _ in range(block):
                    runner.train_loop.run_iter(ours)

            def plain(recipe: Any = recipe, batches: Any = batches) -> None:
                for _ in range(block):
                    recipe.step(next(batches))
            cached()  # the guard of the first steps
            rows = timed({'ours': cached, 'theirs': plain}, pairs)
            print_pairs('text in the step' if in_step else 'text ahead', rows, block)


def compare(runner: Any, recipe: Any) -> None:
    """Give the recipe our weights and one batch with our latents, noise and timesteps: both losses must agree."""
    model = runner.bare_model
    recipe.network.load_state_dict(next(iter(model.adapters.values())).net.state_dict())
    collated = next(iter(runner.train_dataloader))
    batch = model.data_preprocessor(collated, True)['inputs']
    assert batch.img is None, 'everything is in the cache'
    with torch.no_grad():
        ours, conditioning = float(model(batch, mode='loss')['loss']), model.encode(batch)
        inputs = {'latents': model.latents(batch), 'text_embeds': conditioning.text, 'pooled': conditioning.pooled,
                  'time_ids': batch.time_ids, **batch.conditions}
        theirs = float(recipe.loss(inputs, collated['drawn']['noise'], collated['drawn']['timestep']))
    assert abs(ours - theirs) < 1e-5 * abs(theirs), f'the losses differ: {ours}, {theirs}'


def file_rows(source: Path, parts: Mapping[str, Any]) -> FileRows:
    """Return the rows of the recipe's loader, with the text encoders' outputs and tokens of their captions."""
    import json
    texts = [json.loads(line)['text'] for line in (source / 'metadata.jsonl').read_text().splitlines()]
    ids = {name: parts[tokenizer](texts, padding='max_length', max_length=77, truncation=True,
                                  return_tensors='pt').input_ids
           for name, tokenizer in (('ids', 'tokenizer'), ('ids_2', 'tokenizer_2'))}
    with torch.no_grad():
        one, two = (parts[part](ids[name], output_hidden_states=True) for part, name in (
            ('text_encoder', 'ids'), ('text_encoder_2', 'ids_2')))
    embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    return FileRows(source, {'text_embeds': embeds, 'pooled': two[0]}, ids)


def forever(batches: Any) -> Iterator[Any]:
    """Yield the batches of epoch after epoch."""
    while True:
        yield from batches


def print_pairs(name: str, rows: Mapping[str, list[float]], block: int) -> None:
    """Print a row: milliseconds of a step, and the ratio pair by pair."""
    ours, theirs = rows.values()
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    ours_ms, theirs_ms = (statistics.median(values) / block * 1e3 for values in (ours, theirs))
    print(f'| {name} | {ours_ms:.1f} ms | {theirs_ms:.1f} ms | {middle:.3f} | {low:.3f} to {high:.3f} |', flush=True)


def measure_cold(steps: int) -> None:
    """Time the first steps of a run that fills a cache and of one without, in turn."""
    print('| steps | filling | without a cache | ratio of medians |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runners: dict[str, Any] = {}
        batches: dict[str, Iterator[Any]] = {}
        for key in ('filling', 'without'):
            cfg = step_config(folder, (steps + 10) * SIZE)
            cfg.cache = str(folder / 'cache') if key == 'filling' else None
            runners[key], batches[key] = start(cfg)

        def one(key: str) -> Callable[[], Any]:
            return lambda: runners[key].train_loop.run_iter(batches[key])
        rows = timed({key: one(key) for key in runners}, steps, warm_up=5)  # the guard of the first steps
        store = runners['filling'].cache.store
        store.close()
        assert store.counts['moments'][0] == 0, 'each image is new'
        filling, without = (statistics.median(values) for values in rows.values())
        print(f'| {steps} | {filling * 1e3:.1f} ms | {without * 1e3:.1f} ms | {filling / without:.3f} |')
        print(f'\n{store.describe()}')


class Recorder:
    """In place of a store: finds nothing, and holds what was computed."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> None:
        """Find nothing."""

    def put(self, key: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Hold an entry."""
        self.entries[key] = {name: tensor.clone() for name, tensor in tensors.items()}

    def count(self, kind: str, hits: int, misses: int) -> None:
        """Count nothing."""

    def file_digest(self, path: Path) -> str:
        """Return a digest, which nothing remembers."""
        import hashlib
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def kills_config(folder: Path, shuffle: bool) -> Any:
    """Return a config with three crops of each image, on the tiny base."""
    from diffengine_sdxl import config, testing
    if not (folder / 'base').exists():
        testing.write_tiny_sdxl(folder / 'base')
        testing.write_circles(folder / 'images', 24, 48)
    cfg = config.load('tiny_t2i_adapter', {
        'model.pretrained': str(folder / 'base'), 'train_dataloader.dataset.source': str(folder / 'images'),
        'resolution': 32, 'train_dataloader.sampler.shuffle': shuffle, 'train_dataloader.dataset.variants': 3,
        'randomness.seed': 0, 'train_dataloader.num_workers': 0, 'train_dataloader.batch_size': 4})
    cfg.train_dataloader.dataset.transforms = [
        dict(type='Crop', size='$resolution', mode='random'), dict(type='ComputeTimeIds'), dict(type='PackInputs')]
    cfg.cache = str(folder / 'cache')
    return cfg


def fill_in_child(folder: Path, shuffle: bool) -> None:
    """Fill the cache; runs in a process that is killed."""
    with open(folder / 'log.txt', 'a') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from diffengine_sdxl.cache import store
    store.SHARD_ENTRIES = 8  # so that it writes all the time
    torch.set_num_threads(1)
    fill(kills_config(folder, shuffle))


def half_written(folder: Path) -> set[Path]:
    """Return the temporary folders of shards that are being written, or whose writer was killed."""
    return {part for part in folder.glob('.*.part') if part.is_dir() and any(part.iterdir())}


def right_entries(folder: Path, expected: Mapping[str, Mapping[str, Tensor]]) -> int:
    """Return how many entries there are; raise if one is not, bit for bit, what was computed without a cache."""
    from diffengine_sdxl.cache.store import Store
    store, number = Store(folder / 'cache'), 0
    for key, tensors in expected.items():
        if (found := store.get(key)) is not None:
            number += 1
            if found.keys() != tensors.keys() or not all(torch.equal(found[name], t) for name, t in tensors.items()):
                raise ValueError(f'entry {key} is wrong')
    others = store.index.query('SELECT COUNT(*) FROM entries')[0][0] - number
    store.close()
    if others:
        raise ValueError(f'{others} entries are of nothing that was computed')
    return number


def measure_kills(kills: int, seed: int) -> int:
    """Kill two processes that fill one cache, again and again; return the exit code."""
    import shutil

    from diffengine_sdxl.commands.cache import encode
    from diffengine_sdxl.config import resolve
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['diffengine_sdxl.commands.cache', 'datasets', 'diffengine_sdxl.models.sdxl',
                                    'diffusers.models.adapter', 'transformers.models.clip.modeling_clip',
                                    'diffengine_sdxl.testing'])
    draws, good = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder, recorder = Path(name), Recorder()
        encode(resolve(kills_config(folder, False)), recorder)
        begun = time.monotonic()
        child = context.Process(target=fill_in_child, args=(folder, False))
        child.start()
        child.join()
        seconds = time.monotonic() - begun
        print(f'{len(recorder.entries)} entries\n\n| kill | at | entries before | afterwards | all right |\n'
              '|---|---|---|---|---|')
        before, done = right_entries(folder, recorder.entries), 0
        while done < kills:
            children = [context.Process(target=fill_in_child, args=(folder, shuffle)) for shuffle in (False, True)]
            begun, left = time.monotonic(), half_written(folder / 'cache')
            for child in children:
                child.start()
            # Every other one in the middle of writing a shard, the others at random.
            moment, writing = draws.uniform(0.3, 1.0) * seconds, done % 2 == 0
            while any(c.is_alive() for c in children) and not (
                    half_written(folder / 'cache') - left if writing else time.monotonic() - begun > moment):
                time.sleep(0.0005)
            if writing and draws.random() < 0.5:
                time.sleep(draws.uniform(0, 0.02))
            killed = [child.is_alive() for child in children]
            seconds = seconds if any(killed) else time.monotonic() - begun  # the first one imports
            for child in children:
                child.kill()
                child.join()
            if not any(killed) and before == len(recorder.entries):
                shutil.rmtree(folder / 'cache')  # full: begin anew
                before = 0
                continue
            try:
                number, verdict = right_entries(folder, recorder.entries), 'yes'
            except ValueError as error:
                number, verdict = -1, str(error)
            if any(killed):
                done += 1
                good += verdict == 'yes'
                print(f'| {done} | {time.monotonic() - begun:.2f} s | {before} | {number} | {verdict} |', flush=True)
            before = number
            if number == len(recorder.entries):
                shutil.rmtree(folder / 'cache')
                before = 0
    print(f'\n{good} of {kills} right')
    return 0 if good == kills else 1


def measure_full_size(batch_sizes: list[int]) -> None:
    """Print what full-size steps at 1024 px cost with a warm cache and without one, counted on the meta device."""
    from count import ADAPTERS

    from diffengine_sdxl.commands.plan.counter import Rates, counted
    from diffengine_sdxl.commands.plan.meta_model import batch_of, build
    from diffengine_sdxl.structures import Lookups

    def milliseconds(batch: Any) -> float:
        with counted(rates) as counter:
            model(batch, mode='loss')['loss'].backward()
        model.zero_grad(set_to_none=True)
        return counter.seconds * 1e3 / len(batch)
    # An H100, with convolutions in TF32, as PyTorch has them in fp32.
    rates, side = Rates(full=300e12), 1024
    print('| step | batch | VAE | without: ms an image | with: ms an image | ratio |\n|---|---|---|---|---|---|')
    for kind, dtype in itertools.product(('t2i', 'lora'), ('float32', 'bfloat16')):
        model, _ = build(dict(type='SDXL', mixed_precision='bf16', adapters=ADAPTERS[kind], dtype=dict(vae=dtype),
                              objective=dict(type='Denoise')))
        for num in batch_sizes:
            batch = batch_of(model, num, (side, side), {})
            text, pooled, batch.latents, batch.text_embeds, batch.pooled = (
                batch.text_embeds, batch.pooled, None, None, None)
            assert text is not None and pooled is not None
            batch.text, batch.img = [f'a caption of number {i}' for i in range(num)], torch.zeros(
                num, 3, side, side, device='meta')
            without = milliseconds(batch)
            batch.img, keys, shape = None, [str(i) for i in range(num)], (4, side // 8, side // 8)
            moments = {name: torch.zeros(shape, device='meta', dtype=getattr(torch, dtype)) for name in ('mean', 'std')}
            batch.lookups = {'moments': Lookups(keys, [dict(moments) for _ in keys]), 'text': Lookups(
                keys, [{'text_embeds': text[i], 'pooled': pooled[i]} for i in range(num)])}
            cached = milliseconds(batch)
            print(f'| {kind} | {num} | {dtype} | {without:.1f} | {cached:.1f} | {cached / without:.3f} |', flush=True)


def main() -> int:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('section', choices=('step', 'cold', 'kills', 'full-size'))
    parser.add_argument('--pairs', type=int, default=15)
    parser.add_argument('--block', type=int, default=5)
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 4])
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    torch.set_num_threads(1)
    from diffengine_sdxl.commands.common import hide_loading_bars
    hide_loading_bars()
    with mock.patch.dict(os.environ, OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false'):
        if args.section == 'step':
            measure_step(args.pairs, args.block)
        elif args.section == 'cold':
            measure_cold(args.steps)
        elif args.section == 'kills':
            return measure_kills(args.kills, args.seed)
        else:
            measure_full_size(args.batch_sizes)
    return 0


if __name__ == '__main__':
    sys.exit(main())
