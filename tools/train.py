"""Train what a config describes: mim train diffengine_sdxl CONFIG, or python tools/train.py CONFIG."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('train'))
