"""A model in words: its base, and a table of its adapters."""

from __future__ import annotations

from typing import Any

COLUMNS = ('adapter', 'kind', 'attached to', 'reads', 'trainable', 'scale', 'window')


def table(model: Any) -> str:
    """What `print(model)` shows of an SDXL."""
    trained = model.trainables()
    parts = [part for part in model.trainable_parts if part in trained]
    dtype = str(model.unet_weight.dtype).removeprefix('torch.')
    other = f" with the UNet of '{model.other_unet}'" if model.other_unet else ''
    head = (f"SDXL '{model.pretrained or 'random weights'}'{other}, {dtype}, "
            f'{", ".join(parts) if parts else "nothing"} of the base trains')
    if not model.adapters:
        return f'{head}; no adapters'
    rows = [COLUMNS]
    for name, adapter in model.adapters.items():
        count = sum(parameter.numel() for _, parameter in trained.get(name, ()))
        rows.append((name, adapter.kind, adapter.place, adapter.reads or '-', f'{count:,}' if count else 'frozen',
                     f'{adapter.scale:g}', '-'.join(f'{side:g}' for side in adapter.window)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n  '.join([head, *lines])
