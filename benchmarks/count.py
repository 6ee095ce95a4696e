"""Count kernels, bytes and saved activations of a training step of full-size SDXL, on torch's meta device.

    python benchmarks/count.py [--kinds t2i lora ip controlnet] [--batch-sizes 1 4] [--checkpointing off blocks full]

Nothing is computed, so no figure here was measured: the counts are those of `diffengine-sdxl plan`, of an H100. Without
layout copies inside libraries, the allocator's fragments and the optimizer's kernels.
"""

from __future__ import annotations

import argparse
from typing import Any

from diffengine_sdxl.commands.plan.counter import Autocast, Counter, counted
from diffengine_sdxl.commands.plan.meta_model import batch_of, build
from diffengine_sdxl.commands.plan.step_counts import bytes_of, set_all_checkpointing
from diffengine_sdxl.models.sdxl import SDXL

__all__ = ['Autocast', 'Counter']

ADAPTERS: dict[str, dict[str, Any]] = {
    't2i': dict(adapter=dict(type='T2IAdapter')), 'lora': dict(style=dict(type='LoRA', rank=16, alpha=16)),
    'ip': dict(ip=dict(type='IPAdapter', architecture='plus')), 'controlnet': dict(control=dict(type='ControlNet'))}
#: A sample's embeddings of the image prompt's encoder, CLIP ViT-H.
EMBEDS = {'reference': (1, 257, 1280)}


def step(model: SDXL, num: int, side: int) -> dict[str, float]:
    """Count one loss and its backward pass: kernels, GB moved, estimated ms, TFLOP, GiB saved and GiB at the peak."""
    parameters = [p for owned in model.trainables().values() for _, p in owned]
    batch = batch_of(model, num, (side, side), EMBEDS)
    with counted() as counter:
        loss = model(batch, mode='loss')['loss']
        saved = counter.live
        loss.backward()
    assert all(p.grad is not None for p in parameters), 'every trained weight gets a gradient'
    for parameter in parameters:
        parameter.grad = None
    return {'kernels': counter.kernels, 'gb': counter.bytes / 1e9, 'ms': counter.seconds * 1e3,
            'tflop': counter.flop / 1e12, 'saved_gib': saved / 2**30, 'peak_gib': counter.peak / 2**30,
            'adamw_gib': 2 * bytes_of(parameters) / 2**30}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kinds', nargs='+', default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 4])
    parser.add_argument('--checkpointing', nargs='+', default=['off'], choices=('off', 'blocks', 'full'))
    parser.add_argument('--resolution', type=int, default=1024)
    args = parser.parse_args()
    print('| step | batch | checkpointing | kernels | GB moved | ms, estimated | TFLOP an image | saved GiB an image | '
          'peak GiB: step + AdamW + all weights | with the UNet and the adapter only |\n' + '|---' * 10 + '|')
    for kind in args.kinds:
        model, _ = build(dict(type='SDXL', mixed_precision='bf16', adapters=ADAPTERS[kind],
                              objective=dict(type='Denoise')))
        weights = bytes_of(model) / 2**30
        encoders = sum(bytes_of(part) for part in (model.vae, model.text_encoder, model.text_encoder_2,
                                                   model.shared_encoders)) / 2**30
        for mode in args.checkpointing:
            set_all_checkpointing(model, mode)
            for num in args.batch_sizes:
                counts = step(model, num, args.resolution)
                total = counts['peak_gib'] + counts['adamw_gib'] + weights
                print(f'| {kind} | {num} | {mode} | {counts["kernels"]:,} | {counts["gb"]:.0f} | {counts["ms"]:.0f} | '
                      f'{counts["tflop"] / num:.1f} | {counts["saved_gib"] / num:.2f} | {total:.1f} | '
                      f'{total - encoders:.1f} |', flush=True)


if __name__ == '__main__':
    main()
