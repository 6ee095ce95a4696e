"""Summarize a model: its base, and a table of its adapters."""

from __future__ import annotations

from diffengine_sdxl.protocols import Model

COLUMNS = ('adapter', 'kind', 'attached to', 'condition_key', 'trainable', 'scale', 'active_range')
#: Columns that are left out if every adapter has this value.
DEFAULTS = {'scale': '1', 'active_range': '0-1'}


def summary(model: Model) -> str:
    """Return what `print(model)` shows of an SDXL; the numbers are those of parameters that train."""
    counts = {name: sum(p.numel() for _, p in parameters) for name, parameters in model.trainables().items()}
    parts = [f'{part} ({counts[part]:,})' for part in model.trainable_parts if part in counts]
    trains = f'{", ".join(parts)} of the base train{"s" if len(parts) == 1 else ""}' if parts else 'the base is frozen'
    dtype = str(model.unet_weight.dtype).removeprefix('torch.')
    unet = f" with the UNet of '{model.other_unet}'" if model.other_unet else ''
    head = f"SDXL '{model.pretrained or 'random weights'}'{unet}, {dtype}, {trains}"
    if not model.adapters:
        return f'{head}; no adapters'
    rows = [COLUMNS]
    for name, adapter in model.adapters.items():
        rows.append((name, adapter.kind, adapter.attach_point, adapter.condition_key or '-',
                     f'{counts[name]:,}' if counts.get(name) else 'frozen', f'{adapter.scale:g}',
                     '-'.join(f'{side:g}' for side in adapter.active_range)))
    columns = [column for column in zip(*rows, strict=True) if {*column[1:]} != {DEFAULTS.get(column[0])}]
    widths = [max(map(len, column)) for column in columns]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in zip(*columns, strict=True)]
    for name, adapter in model.adapters.items():
        if adapter.weights:
            where = ''.join(f", {key} '{value}'" for key, value in getattr(adapter, 'source', {}).items() if value)
            lines.append(f"{name} {'starts from' if name in counts else 'is'} '{adapter.weights}'{where}")
    return '\n  '.join([head, *lines])
