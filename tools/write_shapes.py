"""Write the shapes data set in the form of fusing/fill50k, for HFDataset: python tools/write_shapes.py FOLDER."""

import sys

from diffengine_sdxl.commands.cli import main

if __name__ == '__main__':
    sys.exit(main('write-shapes'))
