"""Report on the training data of a config: python tools/data.py CONFIG."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('data'))
