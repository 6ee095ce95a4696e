"""A world of coloured shapes, drawn and measured by code; see docs/shapes.md."""

from pathlib import Path

#: Folder of a tiny SDXL trained on this world, in diffusers' layout.
BASE = Path(__file__).resolve().parent / 'base'
