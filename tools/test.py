"""Test a checkpoint: mim test diffengine_sdxl CONFIG --checkpoint X, or python tools/test.py CONFIG X."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('test'))
