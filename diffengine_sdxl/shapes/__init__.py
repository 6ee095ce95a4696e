"""A world of coloured shapes, drawn by code and measured exactly; see docs/shapes.md."""

from pathlib import Path

#: Folder of the tiny SDXL that was trained on this world, in diffusers' layout.
BASE = Path(__file__).resolve().parent / 'base'
