"""Options of diffusers, kohya's sd-scripts, mmengine, A1111 and Refiners, and what to type here instead.

Imports nothing heavy, so that a command which does not know an option answers at once. docs/options.md shows it all.
"""

from .hints import method_hint, sampling_hint, training_hint
from .place import Place
from .sampling import SAMPLING
from .training import TRAINING

__all__ = ['SAMPLING', 'TRAINING', 'Place', 'method_hint', 'sampling_hint', 'training_hint']
