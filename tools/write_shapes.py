"""Write the shapes data set in the form of fusing/fill50k, for HFDataset: python tools/write_shapes.py FOLDER."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Parse the options and write. Import heavy modules afterwards, so that -h answers at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='folder to write; what this tool wrote there before is replaced')
    parser.add_argument('--format', choices=('imagefolder', 'parquet'), default='imagefolder',
                        help='files and metadata.jsonl, or one data.parquet, which is faster for many rows')
    parser.add_argument('--length', type=int, default=50000, help='number of rows (default: 50000)')
    parser.add_argument('--split', default='train', help='which sequence of scenes: train, test, or any other name')
    parser.add_argument('--seed', type=int, default=0, help='seed of the scenes')
    parser.add_argument('--size', type=int, default=64, help='side of the images, in pixels (default: 64)')
    parser.add_argument('--conditioning', choices=('outline', 'edge', 'mask', 'depth', 'none'), default='outline',
                        help='what the conditioning images show (default: outline)')
    parser.add_argument('--styles', nargs='+', default=argparse.SUPPRESS, metavar='STYLE',
                        help='of flat, outlined, striped, glossy, dotted, ringed (default: the first four)')
    parser.add_argument('--combinations', choices=('seen', 'held_out', 'all'), default='seen',
                        help='pairs of fill and shape: seen by the shipped base in training, held out, or all')
    parser.add_argument('--reference', action='store_true', help='also another image in the same colours')
    args = parser.parse_args()
    args.conditioning = None if args.conditioning == 'none' else args.conditioning
    from diffengine_sdxl.errors import run_command
    return run_command('write_shapes', args)


if __name__ == '__main__':
    sys.exit(main())
