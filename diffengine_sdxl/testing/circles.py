"""Drawn circles: images, conditioning images and captions, as in fusing/fill50k."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diffengine_sdxl import rng

COLOURS = {'red': (220, 40, 40), 'green': (40, 160, 60), 'blue': (40, 80, 210), 'cyan': (60, 200, 210),
           'brown': (130, 80, 40), 'gold': (230, 180, 40), 'pink': (240, 140, 180), 'black': (20, 20, 20)}


def draw_circle(index: int, size: int = 64) -> tuple[Image.Image, Image.Image, str]:
    """Draw sample `index`, as in fusing/fill50k: image, conditioning image (white outline on black) and caption."""
    draws = np.random.default_rng(rng.key_seed('circle', index))
    fill, ground = draws.choice(list(COLOURS), size=2, replace=False)
    radius = float(draws.uniform(0.15, 0.35)) * size
    x, y = draws.uniform(radius, size - radius, size=2)
    box = (x - radius, y - radius, x + radius, y + radius)
    image, condition = Image.new('RGB', (size, size), COLOURS[ground]), Image.new('RGB', (size, size))
    ImageDraw.Draw(image).ellipse(box, fill=COLOURS[fill])
    ImageDraw.Draw(condition).ellipse(box, outline=(255, 255, 255), width=max(1, size // 32))
    return image, condition, f'{fill} circle with {ground} background'


def write_circles(folder: str | Path, num_images: int = 16, size: int = 64) -> Path:
    """Write an imagefolder with `metadata.jsonl` (file_name, conditioning_image_file_name, text)."""
    folder = Path(folder)
    for sub in ('images', 'conditioning_images'):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_images):
        image, condition, text = draw_circle(index, size)
        names = f'images/{index:05d}.png', f'conditioning_images/{index:05d}.png'
        image.save(folder / names[0])
        condition.save(folder / names[1])
        rows.append({'file_name': names[0], 'conditioning_image_file_name': names[1], 'text': text})
    (folder / 'metadata.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder
