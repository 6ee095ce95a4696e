"""Summarize a model: its base, and a table of its adapters."""

from __future__ import annotations

from diffengine_sdxl.protocols import Model

COLUMNS = ('adapter', 'kind', 'attached to', 'condition_key', 'trainable', 'scale', 'active_range')


def summary(model: Model) -> str:
    """Return what `print(model)` shows of an SDXL."""
    trainables = model.trainables()
    parts = ', '.join(part for part in model.trainable_parts if part in trainables) or 'nothing'
    dtype = str(model.unet_weight.dtype).removeprefix('torch.')
    unet = f" with the UNet of '{model.other_unet}'" if model.other_unet else ''
    head = f"SDXL '{model.pretrained or 'random weights'}'{unet}, {dtype}, {parts} of the base trains"
    if not model.adapters:
        return f'{head}; no adapters'
    rows = [COLUMNS]
    for name, adapter in model.adapters.items():
        count = sum(parameter.numel() for _, parameter in trainables.get(name, ()))
        rows.append((name, adapter.kind, adapter.attach_point, adapter.condition_key or '-',
                     f'{count:,}' if count else 'frozen', f'{adapter.scale:g}',
                     '-'.join(f'{side:g}' for side in adapter.active_range)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n  '.join([head, *lines])
