"""One training step of a full-size SDXL with its T2I-Adapter, on random weights: does it fit, how long does it take.

python benchmarks/full_size.py [--resolution 256] [--steps 3]
"""

import argparse
import resource
import time

import torch


def main() -> None:
    """Build, step, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--resolution', type=int, default=256)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--gradient-checkpointing', action='store_true')
    args = parser.parse_args()
    from diffengine_sdxl.registry import MODELS
    from diffengine_sdxl.structures import Batch
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    begin = time.perf_counter()
    model = MODELS.build(dict(
        type='SDXL', pretrained=None, mixed_precision='bf16', gradient_checkpointing=args.gradient_checkpointing,
        adapters=dict(adapter=dict(type='T2IAdapter')),
        objective=dict(type='Denoise', timesteps=dict(type='CubicTimesteps')))).to(device)
    built = time.perf_counter() - begin
    parameters = [p for owned in model.trainables().values() for _, p in owned]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    size, count = args.resolution, args.batch_size
    # Text and latents as a cache would deliver them: the UNet's step is what is asked for.
    batch = Batch(text=[''] * count, time_ids=torch.tensor([[size, size, 0, 0, size, size]] * count).float(),
                  key=[str(i) for i in range(count)], epoch=torch.zeros(count).long(), seed=torch.zeros(count).long(),
                  latents=torch.randn(count, 4, size // 8, size // 8), text_embeds=torch.randn(count, 77, 2048),
                  pooled=torch.randn(count, 1280), conditions={'conditioning_image': torch.rand(count, 3, size, size)})
    batch = model.data_preprocessor(batch)['inputs']
    times = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        loss = model(batch, mode='loss')['loss']
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == 'cuda' else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    print(f'| device | resolution | batch | trained parameters | build | first step | later steps | peak memory |\n'
          f'|---|---|---|---|---|---|---|---|\n'
          f'| {device} | {size} | {count} | {sum(p.numel() for p in parameters) / 1e6:.1f} M | {built:.1f} s | '
          f'{times[0]:.2f} s | {sorted(times[1:] or times)[len(times[1:] or times) // 2]:.2f} s | {peak:.2f} GiB |')
    assert torch.isfinite(loss), 'the loss of random weights is finite'


if __name__ == '__main__':
    main()
