"""Time inference here and with diffusers' stock pipeline on the same tiny base, in pairs.

python benchmarks/inference.py loop [--pairs 20]     20 steps with guidance, encoding and decoding, in one process
python benchmarks/inference.py start [--pairs 5]     from the command to the first image, a process each
python benchmarks/inference.py device [--size 1024]  SDXL's own sizes on a GPU: steps a second, memory (random weights)
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPT = 'a red circle on a blue ground'
#: A user's script on the stock pipeline.
STOCK = '''
import sys, torch
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(sys.argv[1])
generator = torch.Generator().manual_seed(0)
pipeline({prompt!r}, num_inference_steps=20, generator=generator).images[0].save(sys.argv[2])
'''


def base(folder: Path, **sizes: Any) -> Path:
    """A tiny SDXL, wide enough for a step of about 50 ms."""
    from diffengine_sdxl.testing import write_tiny_sdxl
    return write_tiny_sdxl(folder / 'base', **{'channels': (32, 64, 128), 'sample_size': 16, **sizes})


def pair(pairs: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Time both in turn, in an order that changes from pair to pair; return the seconds of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for which, work in sorted([(0, ours), (1, theirs)], reverse=bool(i % 2)):
            began = time.perf_counter()
            work()
            times[which].append(time.perf_counter() - began)
    return times


def print_ratio(name: str, times: tuple[list[float], list[float]]) -> None:
    """Print medians, and the median of the pairs' ratios with its quartiles."""
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f'{name}: ours {statistics.median(times[0]):.3f} s, stock {statistics.median(times[1]):.3f} s, ratio '
          f'{middle:.3f} (quartiles {low:.3f} to {high:.3f}, {len(ratios)} pairs)', flush=True)


def loop(pairs: int) -> None:
    """Time an image of 20 steps; check that both make the same one."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionXLPipeline

    from diffengine_sdxl import SDXLInferencer
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = base(Path(folder))
        inferencer = SDXLInferencer('sdxl_text_to_image', device='cpu', cfg_options={
            'model.pretrained': str(source), 'model.vae': None, 'mixed_precision': 'no'})
        pipeline = StableDiffusionXLPipeline.from_pretrained(source)
        pipeline.set_progress_bar_config(disable=True)
        for part in ('unet', 'vae', 'text_encoder', 'text_encoder_2'):
            getattr(pipeline, part).requires_grad_(False)

        def ours() -> Any:
            return inferencer(PROMPT, num_inference_steps=20, seed=0)[0]

        def theirs() -> Any:
            generator = torch.Generator().manual_seed(0)
            return pipeline(PROMPT, num_inference_steps=20, generator=generator).images[0]
        assert np.array_equal(np.asarray(ours()), np.asarray(theirs())), 'both make the same image'
        print_ratio('20 steps', pair(pairs, ours, theirs))


def start(pairs: int) -> None:
    """Time the commands that a user types."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = base(Path(folder)), Path(folder) / 'out'
        numbers = iter(range(10 ** 6))

        def run(*command: str) -> None:
            subprocess.run([sys.executable, *command], check=True, capture_output=True)

        def ours() -> None:
            run(str(ROOT / 'tools' / 'infer.py'), 'sdxl_text_to_image', '--prompt', PROMPT, '--steps', '20', '--device',
                'cpu', '--out', str(out / str(next(numbers))), '--cfg-options', f'model.pretrained={source}',
                'model.vae=None', 'mixed_precision=no')

        def theirs() -> None:
            run('-c', STOCK.format(prompt=PROMPT), str(source), str(Path(folder) / 'stock.png'))
        ours(), theirs()
        print_ratio('start to first image', pair(pairs, ours, theirs))


def device(size: int, pairs: int) -> None:
    """Time a step and measure peak memory at SDXL base 1.0's sizes, with random weights in bf16."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from diffengine_sdxl.models.request_batch import request_batch
    from diffengine_sdxl.models.sdxl import SDXL
    from diffengine_sdxl.request import Request
    if not torch.cuda.is_available():
        sys.exit('No GPU found.')
    model = SDXL(sampler=dict(type='Sampler', num_inference_steps=20), dtype='bfloat16').cuda().eval()
    model.requires_grad_(False)
    pipeline = StableDiffusionXLPipeline(
        vae=model.vae, text_encoder=model.text_encoder, text_encoder_2=model.text_encoder_2, unet=model.unet,
        tokenizer=model.tokenizer, tokenizer_2=model.tokenizer_2, add_watermarker=False,
        scheduler=EulerDiscreteScheduler.from_config(model.scheduler_settings))
    pipeline.set_progress_bar_config(disable=True)

    def ours() -> None:
        model.decode(model.sampler(model, request_batch(model, [Request(prompt=PROMPT)], (size, size))))
        torch.cuda.synchronize()

    def theirs() -> None:
        pipeline(PROMPT, height=size, width=size, num_inference_steps=20, generator=torch.Generator().manual_seed(0),
                 output_type='pt')
        torch.cuda.synchronize()
    ours(), theirs()
    torch.cuda.reset_peak_memory_stats()
    print_ratio(f'20 steps at {size} px on {torch.cuda.get_device_name()}', pair(pairs, ours, theirs))
    print(f'peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB', flush=True)


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('loop', 'start', 'device'))
    parser.add_argument('--pairs', type=int)
    parser.add_argument('--size', type=int, default=1024)
    args = parser.parse_args()
    if args.what == 'device':
        device(args.size, args.pairs or 5)
    else:
        {'loop': loop, 'start': start}[args.what](args.pairs or {'loop': 20, 'start': 5}[args.what])


if __name__ == '__main__':
    main()
