"""Limits on what files, links and settings from outside may cost; applied where their bytes enter.

A config raises one by `limits = dict(download_bytes=2**30)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from diffengine_sdxl.errors import UserError, did_you_mean


@dataclass
class Limits:
    """Every limit with its default; a comment says what it bounds."""

    #: Bytes of one file behind a URL, and seconds until all of it is here.
    download_bytes: int = 2**28
    download_seconds: float = 15.0
    #: Bytes of one image file, also as unpacked from an archive.
    image_bytes: int = 2**28
    #: Pixels of one decoded or resized image.
    image_pixels: int = 2**26
    #: Bytes of one caption file, and of one metadata file of a folder of images.
    caption_bytes: int = 2**20
    metadata_bytes: int = 2**27
    #: Bytes to which a compressed table or archive of a data set may unpack, if they are over 100 times its size.
    unpacked_bytes: int = 2**30
    #: Bytes of one JSON file of settings (config.json, adapter_config.json).
    json_bytes: int = 2**24
    #: Parameters of one component that is built without weights of its own; SDXL's UNet has 2.6 * 10^9.
    model_parameters: int = 2**32
    #: Layers of a block, transformer layers, or control types that the config.json of a ControlNet may have.
    network_layers: int = 128
    #: Bytes of the settings in a PNG, and how deep they are nested.
    png_bytes: int = 2**22
    png_depth: int = 32
    #: What a PNG or a row of a prompt file may ask for: steps, images and the like; any other number whose size may be
    #: work or memory; entries of a list or dict, and of `guidances`, `adapters` and `modules`; characters of a text;
    #: pixels of an image.
    untrusted_count: int = 10_000
    untrusted_number: int = 4096
    untrusted_entries: int = 256
    untrusted_parts: int = 32
    untrusted_characters: int = 20_000
    untrusted_pixels: int = 2**26
    #: Bytes and rows of a prompt file.
    prompt_file_bytes: int = 2**24
    prompt_file_rows: int = 100_000
    #: Steps of a solver, and any whole number among the settings of a scheduler.
    solver_steps: int = 10_000
    #: Characters of a prompt in compel's syntax, whose parser takes time with their square.
    compel_characters: int = 10_000


#: The limits in force.
CURRENT = Limits()


def set_limits(settings: Mapping[str, Any]) -> None:
    """Change limits that are in force.

    Args:
        settings: name -> value, the `limits` of a config.

    Raises:
        UserError: see `check_limits`.
    """
    check_limits(settings)
    for name, value in settings.items():
        setattr(CURRENT, name, value)


def check_limits(settings: Mapping[str, Any]) -> None:
    """Check the `limits` of a config.

    Raises:
        UserError: a name is unknown, or a value is not a number above 0.
    """
    names = [field.name for field in fields(Limits)]
    for name, value in settings.items():
        if name not in names:
            raise UserError(f"limits.{name}: there is no such limit.{did_you_mean(name, names)} They are: "
                            f'{", ".join(names)}.')
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UserError(f'limits.{name}={value!r} must be a number above 0.')
