"""Every registry of the package, each naming the folder whose import fills it.

Those that have a parent are children of mmengine's, one for each that mmengine's runner asks for; the others
are our own. A name is looked up here first and in mmengine after.
"""

import difflib
from typing import Any

import mmengine.registry as root
from mmengine.registry import Registry

SCOPE = 'diffengine_sdxl'


def nearest(name: str, known: list[str]) -> str:
    """Words that name the entries of `known` closest to `name`: " Did you mean 'a' or 'b'?", or "" if none is near."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not close:
        folded = {k.lower(): k for k in known}
        close = [folded[k] for k in difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.5)]
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ''


class NamedRegistry(Registry):
    """A registry that answers an unknown name with the nearest names and its own folder."""

    def get(self, key: str) -> Any:
        """The class or function registered as `key`.

        Raises:
            ValueError: nothing of that name is registered here or in mmengine.
        """
        found = super().get(key)
        if found is None:
            folders = ', '.join(loc.replace('.', '/') for loc in self._locations)
            raise ValueError(
                f"type='{key}' is not a known {self.name}.{nearest(key, self.names())} The {self.name}s of this "
                f'package are in {folders or SCOPE}; a class of your own needs `custom_imports` in the config.')
        return found

    def names(self) -> list[str]:
        """All names that `get` finds, this registry's own first."""
        self.import_from_location()
        own = list(self.module_dict)
        return own + [n for n in (self.parent.module_dict if self.parent is not None else {}) if n not in own]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and super().get(key) is not None


def _registry(name: str, *folders: str, parent: Registry | None = None, **kwargs: Any) -> NamedRegistry:
    return NamedRegistry(name, parent=parent, scope=SCOPE, locations=[f'{SCOPE}.{f}' for f in folders], **kwargs)


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
INFERENCERS = _registry('inferencer', 'engine', parent=root.INFERENCERS)

ADAPTERS = _registry('adapter', 'adapters')
OBJECTIVES = _registry('objective', 'objectives')
NOISES = _registry('noise', 'objectives')
TIMESTEPS = _registry('timestep distribution', 'objectives')
WEIGHTINGS = _registry('loss weighting', 'objectives')
LOSSES = _registry('loss', 'objectives')
SAMPLERS = _registry('sampler', 'samplers')
GUIDANCES = _registry('guidance', 'samplers')
