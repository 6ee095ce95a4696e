"""Write tiny models and data to try things on, or make a config's image on them: python -m diffengine_sdxl.testing."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAM = 'python -m diffengine_sdxl.testing'
#: Name of what is written for the tiny base -> its config.
ADAPTERS: dict[str, dict[str, Any]] = {
    'lora': {'type': 'LoRA', 'rank': 4}, 'ip_adapter': {'type': 'IPAdapter', 'image_encoder_subfolder': None},
    't2i_adapter': {'type': 'T2IAdapter'}, 'controlnet': {'type': 'ControlNet'},
    'controlnet_union': {'type': 'ControlNet', 'control_type': 'canny'}}
#: A ControlNet in one file, as others distribute them.
FILE = 'controlnet.safetensors'


def write(folder: Path, num_images: int) -> None:
    """Write tiny models and data into `folder`."""
    from diffengine_sdxl.testing import write_circles, write_tiny_image_encoder, write_tiny_refiner, write_tiny_sdxl
    from diffengine_sdxl.testing.adapters import write_original_controlnet, write_tiny_adapter
    base = write_tiny_sdxl(folder / 'base')
    write_tiny_refiner(folder / 'refiner')
    encoder = write_tiny_image_encoder(folder / 'image_encoder')
    for name, config in ADAPTERS.items():
        own = {'image_encoder': str(encoder)} if config['type'] == 'IPAdapter' else {}
        write_tiny_adapter(folder / name, base, {**config, **own})
    write_original_controlnet(folder / FILE, folder / 'controlnet')
    write_circles(folder / 'data', num_images)


def commands(folder: Path) -> list[str]:
    """Return commands that make images with what `write` wrote, and one that trains on it."""
    image, outline = (folder / 'data' / kind / '00000.png' for kind in ('images', 'conditioning_images'))
    options: dict[str, list[str]] = {
        'base': [], 'image_to_image': ['--image', f'{image}', '--strength', '0.6'],
        'lora': ['--adapter', f'style={folder / "lora"},scale=0.8'],
        'ip_adapter': ['--adapter', f'ip={folder / "ip_adapter"}', '--condition', f'{image}'],
        't2i_adapter': ['--adapter', f'edges={folder / "t2i_adapter"}', '--condition', f'{outline}'],
        'controlnet': ['--adapter', f'edges={folder / "controlnet"}', '--condition', f'{outline}'],
        'controlnet_union': ['--adapter', f'edges={folder / "controlnet_union"},control_type=canny', '--condition',
                             f'{outline}'],
        'controlnet_file': ['--adapter', f'edges={folder / FILE},scale=0.5', '--condition', f'{outline}']}
    infer, base = ['diffengine-sdxl', 'infer'], ['mixed_precision=no', f'model.pretrained={folder / "base"}']
    lines = [[*infer, 'sdxl_text_to_image', '--prompt', 'a red circle', *own, '--out', f'{folder / "images" / name}',
              '--cfg-options', *base] for name, own in options.items()]
    lines += [[*infer, 'sdxl_base_refiner', '--prompt', 'a red circle', '--out', f'{folder / "images" / "refiner"}',
               '--cfg-options', *base, f'refiner.pretrained={folder / "refiner"}'],
              ['diffengine-sdxl', 'train', 'tiny_t2i_adapter', '--work-dir', f'{folder / "run"}', '--cfg-options',
               base[1], f'train_dataloader.dataset.source={folder / "data"}']]
    return [shlex.join(line) for line in lines]


def write_main(argv: Sequence[str]) -> int:
    """Write, and print what to try."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description='Write a tiny SDXL, its refiner, an image encoder, adapters of each kind and data.',
        epilog=f'To make the image of any config on such weights, without network: {PROGRAM} run CONFIG ... To try '
        f'a loader of adapters: {PROGRAM} layouts FOLDER')
    parser.add_argument('folder', type=Path, help='where to write')
    parser.add_argument('--num-images', type=int, default=64, help='of the data (default: %(default)s)')
    args = parser.parse_args(argv)
    from diffengine_sdxl.commands.common import hide_loading_bars
    hide_loading_bars()
    write(args.folder, args.num_images)
    print(f'{args.folder} holds base, refiner, image_encoder, {", ".join([*ADAPTERS, FILE])} and data; all weights are '
          'random. To try them:\n')
    print('\n'.join(commands(args.folder)))
    return 0


def run_main(argv: Sequence[str]) -> int:
    """Make an image with each config; return 1 if one fails."""
    parser = argparse.ArgumentParser(
        prog=f'{PROGRAM} run', description='Make an image with each config on tiny random weights, without network: '
        'ids of the hub, links and images are replaced by tiny ones of the same kind, and sizes and steps are smaller.')
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='path, or base name of an installed config')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/tried'), help='folder (default: %(default)s)')
    args = parser.parse_args(argv)
    # huggingface_hub reads it when it is imported: what is not replaced ends in a sentence, not in a download.
    os.environ['HF_HUB_OFFLINE'] = '1'
    from diffengine_sdxl.commands.common import hide_loading_bars
    from diffengine_sdxl.errors import user_message
    from diffengine_sdxl.testing.stand_ins import StandIns, make_image
    hide_loading_bars()
    num_made = 0
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = StandIns(folder)
        for name in args.configs:
            path = args.out / f'{Path(name).stem}.png'
            try:
                image = make_image(name, stand_ins)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
            except Exception as error:
                if (message := user_message(error)) is None:
                    raise
                print(f'error: {name}: {message}', file=sys.stderr)
            else:
                num_made += 1
                print(path, flush=True)
    print(f'{num_made} of {len(args.configs)} made images.')
    return int(num_made < len(args.configs))


def layouts_main(argv: Sequence[str]) -> int:
    """Write an adapter in every layout."""
    parser = argparse.ArgumentParser(
        prog=f'{PROGRAM} layouts', description='Write one adapter in every layout that programs write, with the change '
        "of a tiny base's output that a right loader must produce; the folder's README.txt says how to compare.")
    parser.add_argument('folder', type=Path, help='where to write')
    args = parser.parse_args(argv)
    from diffengine_sdxl.commands.common import hide_loading_bars
    from diffengine_sdxl.testing.layouts import write_layouts
    hide_loading_bars()
    layouts = write_layouts(args.folder)
    num_refused = sum(bool(layout.refused) for layout in layouts.values())
    print(f'{args.folder} holds {len(layouts)} layouts, {num_refused} of which must be refused; see '
          f'{args.folder / "README.txt"}.')
    return 0


def main(argv: Sequence[str]) -> int:
    """Run `write_main`, or another command where the first argument names it."""
    named = {'run': run_main, 'layouts': layouts_main}.get(argv[0]) if argv else None
    return named(argv[1:]) if named else write_main(argv)


if __name__ == '__main__':
    import torch
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
