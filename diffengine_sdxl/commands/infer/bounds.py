"""Bound what settings of unknown origin, in a PNG or a row of a prompt file, ask for: time and memory."""

from __future__ import annotations

from typing import Any

from diffengine_sdxl import limits
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.request import SCORES, SIZES, STEPS, Request

#: Keys whose number, or whose list's length, is that of things which are made one after the other.
COUNTS = (*STEPS, 'num_train_timesteps', 'num_images_per_prompt')
#: Keys whose numbers cost nothing, whatever they are; height and width are bounded by their product.
HARMLESS = (*SIZES, *SCORES, 'seed', 'height', 'width', 'latents_row', 'padding_mask_crop')
#: Keys of lists and dicts of parts, each of which is built or imported.
PARTS = ('guidances', 'adapters', 'modules')


def check_bounds(node: Any, what: str, place: str = '', key: Any = '', depth: int = 0) -> None:
    """Refuse settings that would exhaust time or memory.

    Args:
        what: how errors name the origin: 'a PNG'.
        place: of `node` in the settings, with dots; key: the last one in `place` that is not an index.
        depth: of `node`.

    Raises:
        UserError: names the place and the limit.
    """
    most = limits.CURRENT
    if depth > most.png_depth:
        raise UserError(f"'{place[:60]}...' is nested more than {most.png_depth} deep.")
    if isinstance(node, dict | list | tuple):
        entries = most.untrusted_parts if key in PARTS else most.untrusted_entries
        if key in COUNTS:
            entries = most.untrusted_count
        if len(node) > entries:
            raise UserError(f"'{place}' has {len(node)} entries; {what} may hold at most {entries}.")
        for name, part in list(node.items() if isinstance(node, dict) else enumerate(node)):
            check_bounds(part, what, f'{place}.{name}' if place else str(name), name if isinstance(name, str) else key,
                         depth + 1)
    elif isinstance(node, str) and len(node) > most.untrusted_characters:
        raise UserError(f"'{place}' has {len(node)} characters; {what} may hold at most {most.untrusted_characters}.")
    elif isinstance(node, int | float):
        if isinstance(node, int) and not -2**63 <= node < 2**63:
            raise UserError(f"'{place}' is a number of {node.bit_length()} bits.")
        bound = most.untrusted_count if key in COUNTS else most.untrusted_number
        if key not in HARMLESS and not abs(node) <= bound:  # also NaN
            raise UserError(f"'{place}' asks for {node}; {what} may ask for at most {bound}.")


def check_pixels(request: Request, what: str) -> None:
    """Refuse a size of the images that exhausts memory.

    Raises:
        UserError: names the size and the limit.
    """
    most = limits.CURRENT.untrusted_pixels
    if (request.height or 1) * (request.width or 1) > most:
        raise UserError(f"'request' asks for {request.height} x {request.width} pixels; {what} may ask for at most "
                        f'{most}.')
