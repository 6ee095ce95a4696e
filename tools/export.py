"""Export one adapter for other tools, and verify it: python tools/export.py CONFIG OUT --checkpoint X."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse the options and export. Import heavy modules afterwards, so that -h answers at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='path of a config, or base name of an installed one')
    parser.add_argument('out', type=Path, help='folder to write, or for kohya a file *.safetensors; must not exist')
    parser.add_argument('--checkpoint', help='a step<N>.pth; a work dir (its latest); an exported step<N>/ or '
                                             "adapter's folder (default: the adapter's `weights` in the config)")
    parser.add_argument('--adapter', help='its name in the config; required if there are several')
    parser.add_argument('--format', choices=('diffusers', 'peft', 'kohya', 'original'),
                        help="default: that of the adapter's own ecosystem")
    parser.add_argument('--dtype', choices=('float16', 'bfloat16', 'float32'),
                        help='dtype of the written weights (default: unchanged)')
    parser.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override keys of the config')
    args = parser.parse_args()
    from diffengine_sdxl.errors import run_command
    return run_command('export', args)


if __name__ == '__main__':
    sys.exit(main())
