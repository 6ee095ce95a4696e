"""`python -m diffengine_sdxl`, the same as the command `diffengine-sdxl`."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main())
