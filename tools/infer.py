"""Make images: mim run diffengine_sdxl infer CONFIG --prompt 'a castle', or python tools/infer.py with the same."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('infer'))
