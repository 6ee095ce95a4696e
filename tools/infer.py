"""Make images: mim run diffengine_sdxl infer CONFIG --prompt 'a castle', or python tools/infer.py with the same."""

import argparse
import sys


def main() -> int:
    """Parse the options and make images. Import heavy modules afterwards, so that -h answers at once."""
    parser = argparse.ArgumentParser(description=__doc__, usage='%(prog)s CONFIG [options]; -h lists them')
    parser.add_argument('config', help='path of a config, base name of an installed one, or a PNG made here, to make '
                                       'it again')
    parser.add_argument('--prompt', nargs='+', help="prompts (default: the config's)")
    parser.add_argument('--prompts', help='file of prompts: .txt, one per line; .jsonl or .csv, with settings per row')
    parser.add_argument('--prompt-2', help='for the second text encoder')
    parser.add_argument('--negative-prompt', help='what to avoid')
    parser.add_argument('--negative-prompt-2', help='the same for the second text encoder')
    parser.add_argument('--image', help='image to start from: path or URL')
    parser.add_argument('--mask-image', help='where to repaint it: white')
    parser.add_argument('--strength', type=float, help='how far towards noise the image is taken, 0 to 1')
    parser.add_argument('--condition', action='append', metavar='ADAPTER=FILE',
                        help="an adapter's image; repeat it for several; ADAPTER.mask=FILE for where it acts")
    parser.add_argument('--adapter', action='append', metavar='NAME=SOURCE[,KEY=VALUE]',
                        help='an adapter from a file, folder or hub id: style=X.safetensors,scale=0.8 or '
                             'depth=ID,type=T2IAdapter,revision=...,subfolder=...; a LoRA if no type is given')
    parser.add_argument('--seed', type=int, help='of the first image of each prompt; the next ones count up')
    parser.add_argument('--num-images', type=int, dest='num_images_per_prompt', help='images per prompt')
    parser.add_argument('--steps', type=int, dest='num_inference_steps', help='solver steps')
    parser.add_argument('--guidance-scale', type=float, help='of classifier-free guidance')
    parser.add_argument('--height', type=int, help='in pixels')
    parser.add_argument('--width', type=int, help='in pixels')
    parser.add_argument('--denoising-end', type=float, help='part of the sampling at which the refiner takes over')
    parser.add_argument('--set', nargs='+', metavar='KEY=VALUE', help='any other setting (docs/inference.md): '
                        'original_size=(512,512) scales.style=0.5')
    parser.add_argument('--weights', help='a step<N>.pth; a work dir (its latest); an exported folder; none for the '
                                          'base without adapters (default: as the config names them)')
    parser.add_argument('--out', help='folder for the images (default: work_dirs/<config>/images)')
    parser.add_argument('--batch-size', type=int, default=1, help='images per batch (default: 1, which makes an image '
                        'again bitwise)')
    parser.add_argument('--device', help='cuda, cuda:1, cpu, ... (default: the best available)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override keys of the config')
    args = parser.parse_args()
    from diffengine_sdxl.errors import run_command
    return run_command('infer', args)


if __name__ == '__main__':
    sys.exit(main())
