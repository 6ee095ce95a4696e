"""All registries; each names the folders whose import fills it.

Those with a parent extend mmengine's: a name is looked up here first, then in mmengine.
"""

import re
import reprlib
from typing import Any

import mmengine.registry as root
from mmengine.registry import Registry

from diffengine_sdxl.errors import UserError, did_you_mean, first_line

SCOPE = 'diffengine_sdxl'
#: What constructors of other packages raise for values that they don't take.
VALUE_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, AttributeError)


class NamedRegistry(Registry):
    """A registry that refuses an unknown name with the nearest names and its folders."""

    def get(self, key: str) -> Any:
        """Return the class or function registered as `key`.

        Raises:
            UserError: it is registered neither here nor in mmengine.
        """
        # Else mmengine would take the name for that of a module, or fail.
        entry = super().get(key) if re.fullmatch(r'\w+([.:]+\w+)*', key) else None
        if entry is None:
            folders = ', '.join(loc.replace('.', '/') for loc in self._locations)
            raise UserError(
                f"type='{key}' is not a known {self.name}.{did_you_mean(key, self.names())} The {self.name}s of this "
                f'package are in {folders or SCOPE}; your own class needs a module in the '
                'config\'s `custom_imports` (docs/adding_an_adapter.md).')
        return entry

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Build what a config names, as mmengine does.

        Raises:
            UserError: a class of another package does not take the values; those of ours say so themselves.
        """
        try:
            return super().build(cfg, *args, **kwargs)
        except UserError:
            raise
        except VALUE_ERRORS as error:
            cls = cfg.get('type') if isinstance(cfg, dict) else None
            cls = self.get(cls) if isinstance(cls, str) else cls
            if cls is None or str(getattr(cls, '__module__', SCOPE)).partition('.')[0] == SCOPE:
                raise
            values = ', '.join(f'{key}={reprlib.repr(value)}' for key, value in cfg.items() if key != 'type')
            raise UserError(f"{getattr(cls, '__name__', cls)} cannot be built with {values or 'no arguments'}: "
                            f'{first_line(error)}.') from error

    def names(self) -> list[str]:
        """Return all names that `get` knows, those of this package first."""
        self.import_from_location()
        return list({**self.module_dict, **(self.parent.module_dict if self.parent is not None else {})})

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and super().get(key) is not None


def _registry(name: str, *folders: str, parent: Registry | None = None) -> NamedRegistry:
    return NamedRegistry(name, parent=parent, scope=SCOPE, locations=[f'{SCOPE}.{f}' for f in folders])


MODELS = _registry('model', 'models', parent=root.MODELS)
MODEL_WRAPPERS = _registry('model wrapper', parent=root.MODEL_WRAPPERS)
WEIGHT_INITIALIZERS = _registry('weight initializer', parent=root.WEIGHT_INITIALIZERS)
DATASETS = _registry('dataset', 'datasets', parent=root.DATASETS)
DATA_SAMPLERS = _registry('data sampler', 'datasets', parent=root.DATA_SAMPLERS)
TRANSFORMS = _registry('transform', 'datasets.transforms', parent=root.TRANSFORMS)
FUNCTIONS = _registry('function', 'datasets', parent=root.FUNCTIONS)
METRICS = _registry('metric', 'evaluation', parent=root.METRICS)
EVALUATOR = _registry('evaluator', 'evaluation', parent=root.EVALUATOR)
HOOKS = _registry('hook', 'engine.hooks', parent=root.HOOKS)
LOOPS = _registry('loop', 'engine', parent=root.LOOPS)
RUNNERS = _registry('runner', 'engine', parent=root.RUNNERS)
RUNNER_CONSTRUCTORS = _registry('runner constructor', parent=root.RUNNER_CONSTRUCTORS)
STRATEGIES = _registry('strategy', parent=root.STRATEGIES)
OPTIMIZERS = _registry('optimizer', 'engine', parent=root.OPTIMIZERS)
OPTIM_WRAPPERS = _registry('optimizer wrapper', 'engine', parent=root.OPTIM_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = _registry('optimizer wrapper constructor', 'engine',
                                       parent=root.OPTIM_WRAPPER_CONSTRUCTORS)
PARAM_SCHEDULERS = _registry('parameter scheduler', 'engine', parent=root.PARAM_SCHEDULERS)
TASK_UTILS = _registry('task util', parent=root.TASK_UTILS)
VISUALIZERS = _registry('visualizer', 'engine', parent=root.VISUALIZERS)
VISBACKENDS = _registry('visualization backend', 'engine', parent=root.VISBACKENDS)
LOG_PROCESSORS = _registry('log processor', 'engine', parent=root.LOG_PROCESSORS)
INFERENCERS = _registry('inferencer', 'inference', parent=root.INFERENCERS)

ADAPTERS = _registry('adapter', 'adapters')
OBJECTIVES = _registry('objective', 'objectives')
NOISES = _registry('noise', 'objectives')
TIMESTEPS = _registry('timestep distribution', 'objectives')
WEIGHTINGS = _registry('loss weighting', 'objectives')
LOSSES = _registry('loss', 'objectives')
SAMPLERS = _registry('sampler', 'samplers')
GUIDANCES = _registry('guidance', 'samplers')
