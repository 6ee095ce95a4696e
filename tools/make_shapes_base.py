"""Make the tiny base of the shapes world: its components, its VAE, and the shipped folder; see docs/shapes.md."""

import argparse
import itertools
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

# Both encoders share a vocabulary: a token for each word of the captions, and for each byte.
SEQUENCE = 32
WIDTHS = (32, 64, 128)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return tokens and merges of a byte-level BPE in which every word of the captions is one token.

    Source: Sennrich et al. 2016; merged in the order of frequency until every word is one token.
    """
    from collections import Counter

    from diffengine_sdxl.shapes import palette, scene
    from diffengine_sdxl.testing import byte_characters
    texts = ' '.join([*scene.TEMPLATES, *palette.NAMES, *scene.SHAPES, *scene.STYLES, *scene.TEXTURES, 'a an on the'])
    words = sorted(set(texts.replace('{', ' ').replace('}', ' ').replace(',', ' ').replace('_', ' ').split()))
    characters = byte_characters()
    tokens, merges = [*characters, *[c + '</w>' for c in characters]], []
    parts = [[*word[:-1], word[-1] + '</w>'] for word in words]
    while any(len(p) > 1 for p in parts):
        counts = Counter(pair for p in parts for pair in itertools.pairwise(p))
        best = max(sorted(counts), key=counts.__getitem__)
        merges.append(best)
        if ''.join(best) not in tokens:
            tokens.append(''.join(best))
        parts = [_merge(p, best) for p in parts]
    tokens += ['<|startoftext|>', '<|endoftext|>']
    return {token: i for i, token in enumerate(tokens)}, merges


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(parts):
        both = tuple(parts[i:i + 2]) == pair
        merged.append(''.join(pair) if both else parts[i])
        i += 2 if both else 1
    return merged


def components() -> dict[str, Any]:
    """Return the components of the base with random weights, of SDXL's classes."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from diffengine_sdxl import testing
    from diffengine_sdxl.shapes import scene
    vocab, merges = vocabulary()
    torch.manual_seed(0)
    end = len(vocab) - 1
    text = dict(vocab_size=len(vocab), hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=SEQUENCE, bos_token_id=end - 1, eos_token_id=end)
    tokenizers = [CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=SEQUENCE, pad_token=pad,
                                closed_vocabulary=list(scene.WORDS)) for pad in ('<|endoftext|>', '!')]
    return dict(
        vae=AutoencoderKL(block_out_channels=(16, 48, 64), norm_num_groups=8, latent_channels=4, layers_per_block=1,
                          down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3,
                          sample_size=64, scaling_factor=1.0, force_upcast=False),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, pad_token_id=end, hidden_act='quick_gelu')),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text, pad_token_id=0, hidden_act='gelu',
                                                                  projection_dim=64)),
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
        unet=testing.tiny_unet(
            WIDTHS, cross_attention_dim=128, pooled=64, sample_size=16, transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=tuple(c // 16 for c in WIDTHS), addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=16 * 6 + 64),
        # Zero terminal SNR, v and trailing steps: in so small a latent the noise's mean would reveal the colours.
        scheduler=testing.sdxl_scheduler(prediction_type='v_prediction', rescale_betas_zero_snr=True,
                                         timestep_spacing='trailing', steps_offset=0))


def write_components(folder: Path) -> None:
    """Write the configs and tokenizers of the base without weights, for `model.config`."""
    from diffusers import StableDiffusionXLPipeline
    StableDiffusionXLPipeline(**components(), add_watermarker=False).save_pretrained(str(folder))
    for weights in folder.glob('*/*.safetensors'):
        weights.unlink()


def take_vae(export: Path, folder: Path, num_images: int = 2048) -> None:
    """Write the trained VAE of `export` (step<N>) to `folder`/vae, scaled to latents with standard deviation 1."""
    import torch
    from diffusers import AutoencoderKL

    from diffengine_sdxl.datasets import Shapes, collate
    from diffengine_sdxl.models.data_preprocessor import images_to_floats
    vae = AutoencoderKL.from_pretrained(export / 'pipeline' / 'vae')
    data = Shapes(length=num_images, conditioning=None, split='scale',
                  transforms=[{'type': 'ComputeTimeIds'}, {'type': 'PackInputs'}])
    with torch.no_grad():
        batches = (images_to_floats(collate([data[i] for i in range(start, min(start + 64, num_images))]))
                   for start in range(0, num_images, 64))
        latents = torch.cat([vae.encode(batch['img']).latent_dist.mean for batch in batches])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    vae.save_pretrained(str(folder / 'vae'))
    print(f'scaling_factor {vae.config.scaling_factor}; means of the channels, scaled: '
          f'{(latents.mean(dim=(0, 2, 3)) * vae.config.scaling_factor).tolist()}')


def record(export: Path) -> dict[str, Any]:
    """Return the entries of the base's manifest for the run of `export`."""
    text = (export / 'manifest.json').read_text()
    # Remove the machine's own paths.
    folders = {str(export.resolve().parents[1]): 'work_dirs', str(Path(__file__).resolve().parents[1]) + '/': ''}
    for folder, name in folders.items():
        text = text.replace(folder, name)
    run = json.loads(re.sub(r'"/[^"]*?/?([^/"]+/[^/"]+)"', r'"work_dirs/\1"', text))
    seconds = 0.0
    for log in sorted(export.parent.glob('*/vis_data/scalars.json')):
        logged = [json.loads(line) for line in log.read_text().splitlines()]
        logged = [row for row in logged if 'time' in row and 'step' in row]
        steps = [row['step'] for row in logged]
        interval = min((b - a for a, b in itertools.pairwise(steps)), default=0)
        seconds += sum(row['time'] * interval for row in logged)
    return {'step': run['step'], 'seconds': round(seconds), 'ema': run['ema'], 'seed': run['seed'],
            'time': run['time'], 'git_commit': run['git_commit'], 'versions': run['versions'],
            'config': run['config']}


def assemble(folder: Path, runs: dict[str, Path]) -> None:
    """Write the trained components to `folder` as fp16, with a manifest; at most 20 MB.

    Args:
        runs: 'vae', 'decoder', 'pretrain', 'fine', 'unet', 'image_encoder' -> exports (step<N>); 'unet' and
            'image_encoder' are copied, the others only recorded (the VAE is in `folder` already), also 'unet, run 1'
            and so on. Runs that are not among them stay recorded as the folder's manifest has them.
    """
    import torch
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

    from diffengine_sdxl.loading import base as loading
    from diffengine_sdxl.versions import git_commit
    for name in ('unet', 'text_encoder', 'text_encoder_2'):
        model = loading.module_class(name).from_pretrained(runs['unet'] / 'pipeline', subfolder=name)
        model.to(torch.float16).save_pretrained(str(folder / name))
    vae = loading.module_class('vae').from_pretrained(folder, subfolder='vae')
    vae.to(torch.float16).save_pretrained(str(folder / 'vae'))
    index = json.loads((folder / 'model_index.json').read_text())
    if 'image_encoder' in runs:
        source = runs['image_encoder'] / 'image_encoder'
        CLIPVisionModelWithProjection.from_pretrained(source).to(torch.float16).save_pretrained(
            str(folder / 'image_encoder'))
        CLIPImageProcessorPil.from_pretrained(source).save_pretrained(str(folder / 'feature_extractor'))
        index.update(image_encoder=['transformers', 'CLIPVisionModelWithProjection'],
                     feature_extractor=['transformers', 'CLIPImageProcessor'])
    (folder / 'model_index.json').write_text(json.dumps(dict(sorted(index.items())), indent=2) + '\n')
    for config in folder.glob('*/config.json'):
        # transformers loads in the config's dtype, diffusers in fp32: make them agree; and forget the machine's paths.
        values = json.loads(config.read_text())
        values.pop('_name_or_path', None)
        config.write_text(json.dumps(values | ({'dtype': 'float32'} if 'dtype' in values else {}), indent=2) + '\n')
    file = folder / 'manifest.json'
    before = json.loads(file.read_text())['runs'] if file.is_file() else {}
    manifest = {'what': 'a tiny SDXL of the shapes world, trained by this package (docs/shapes.md)',
                'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'put_together_at': git_commit(),
                'runs': {**before, **{name: record(path) for name, path in runs.items()}}}
    file.write_text(json.dumps(manifest, indent=1) + '\n')
    size = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
    assert size < 20e6, f'{folder} has {size / 1e6:.1f} MB, more than 20'
    print(f'{folder}: {size / 1e6:.1f} MB')


def main() -> int:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    helps = {'components': 'write configs and tokenizers, without weights', 'vae': 'copy a trained VAE',
             'assemble': 'copy all trained components as fp16, with a manifest'}
    for name, help_text in helps.items():
        command = commands.add_parser(name, help=help_text)
        command.add_argument('folder', type=Path, help='the base')
        if name != 'components':
            command.add_argument('--vae', type=Path, required=name == 'vae', help='export (step<N>) of shapes_vae')
        if name == 'assemble':
            command.add_argument('--decoder', type=Path, help='export of shapes_vae_decoder, for the manifest')
            command.add_argument('--pretrain', type=Path, help='export of shapes_pretrain, for the manifest')
            command.add_argument('--fine', type=Path, help='export of shapes_pretrain_fine, for the manifest')
            command.add_argument('--unet', type=Path, required=True, help='export of shapes_pretrain_partial')
            command.add_argument('--earlier', type=Path, nargs='*', default=[],
                                 help='exports of earlier runs of shapes_pretrain_partial, for the manifest')
            command.add_argument('--image-encoder', type=Path, help='export of shapes_image_encoder')
    args = parser.parse_args()
    if args.command == 'components':
        write_components(args.folder)
    elif args.command == 'vae':
        take_vae(args.vae, args.folder)
    else:
        runs = {name: getattr(args, name) for name in ('vae', 'decoder', 'pretrain', 'fine', 'unet', 'image_encoder')}
        runs |= {f'unet, run {i}': path for i, path in enumerate(args.earlier, 1)}
        assemble(args.folder, {name: path for name, path in runs.items() if path})
    return 0


if __name__ == '__main__':
    sys.exit(main())
