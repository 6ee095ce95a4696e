"""Find, read, override, check and resolve config files."""

from .load import find, installed_configs, load, read
from .overrides import parse_overrides
from .references import resolve, to_plain

__all__ = ['find', 'installed_configs', 'load', 'parse_overrides', 'read', 'resolve', 'to_plain']
