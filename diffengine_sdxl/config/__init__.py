"""Read, override, check and resolve config files; `config_files` finds them."""

from .load import find, load, read
from .overrides import parse_overrides
from .references import resolve, to_plain

__all__ = ['find', 'load', 'parse_overrides', 'read', 'resolve', 'to_plain']
