"""The table of options, and a small config in which an option of it can be set and checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from options.page import plain

from diffengine_sdxl import config
from diffengine_sdxl.datasets import Draw
from diffengine_sdxl.engine.optim import AdapterOptimWrapperConstructor
from diffengine_sdxl.field_names import TRAINING
from diffengine_sdxl.field_names.place import by_name
from diffengine_sdxl.registry import DATASETS, MODELS, RUNNERS

ROOT = Path(__file__).resolve().parents[2]
FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'


#: Option -> what to type for it in the T2I-Adapter's configs.
TABLE = {name: plain(place).replace('NAME', 'adapter') for name, place in by_name(TRAINING).items()}
Overrides = dict[str, Any]


class Cases:
    """The checks of one file; as a decorator, it adds one."""

    def __init__(self) -> None:
        self.checks: dict[str, tuple[Overrides, Callable[..., None]]] = {}

    def __call__(self, *options: str, **values: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register the check of `options`. `values`: last part of a key -> value in place of the table's."""
        def add(function: Callable[..., None]) -> Callable[..., None]:
            self.checks.update(dict.fromkeys(options, (values, function)))
            return function
        return add

    def run(self, option: str, request: pytest.FixtureRequest) -> None:
        """Check `option`, with the fixtures that its check names after the world."""
        values, check = self.checks[option]
        base, data, tmp = (request.getfixturevalue(name) for name in ('tiny_base', 'circles', 'tmp_path'))
        fixtures = check.__code__.co_varnames[1:check.__code__.co_argcount]
        check(World(base, data, tmp, option, values), *(request.getfixturevalue(name) for name in fixtures))


class World:
    """Build parts of the real config on a tiny base, with an option's overrides."""

    def __init__(self, base: Path, data: Path, tmp: Path, option: str, values: Overrides) -> None:
        self.base, self.data, self.tmp, self.setting = base, data, tmp, TABLE[option]
        self.placeholders = {'BASE': base, 'DATA': data, 'DIR': tmp / 'dir'}
        self.overrides: Overrides = {}
        self.name = FILL50K if 'condition.' not in self.setting else 'stable_diffusion_xl_t2i_adapter_canny'
        if not self.setting.startswith('--'):
            self.overrides = config.parse_overrides(self.setting.split())
            for key, value in self.overrides.items():
                self.overrides[key] = values.get(key.rpartition('.')[2], value)

    def config(self, **others: Any) -> Any:
        """Load the config with the tiny base and data; the option's overrides take precedence."""
        tiny = {'model.pretrained': str(self.base), 'model.vae': None, 'resolution': 64, 'mixed_precision': 'no',
                'train_dataloader.dataset.source': str(self.data), 'train_dataloader.num_workers': 0,
                'train_cfg.max_iters': 4, **others, **self.overrides}
        return config.load(self.name, {k: self._replaced(v) for k, v in tiny.items()})

    def _replaced(self, value: Any) -> Any:
        return str(self.placeholders[value]) if isinstance(value, str) and value in self.placeholders else value

    def resolved(self, **others: Any) -> Any:
        return config.resolve(self.config(**others))

    def model(self, **others: Any) -> Any:
        return MODELS.build(dict(self.resolved(**others).model))

    def dataset(self) -> Any:
        return DATASETS.build(dict(self.resolved().train_dataloader.dataset))

    def sample(self) -> Any:
        return self.dataset()[Draw(0, 0, 0)]

    def optim_wrapper(self) -> Any:
        cfg = dict(self.resolved().optim_wrapper)
        cfg.pop('constructor')
        return AdapterOptimWrapperConstructor(cfg)(Two())

    def group(self) -> Any:
        return self.optim_wrapper().param_groups[0]

    def runner(self, **others: Any) -> Any:
        cfg = self.config(**others)
        cfg.work_dir, cfg.experiment_name = str(self.tmp / 'run'), self.tmp.name
        return RUNNERS.build(cfg)

    def rates(self, num: int) -> list[float]:
        """Return the learning rates of a run of `num` steps."""
        runner = self.runner(**{'train_cfg.max_iters': num, 'optim_wrapper.optimizer.lr': 1.0})
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        rates = []
        for scheduler in runner.build_param_scheduler(runner.param_schedulers):
            for _ in range(num):
                rates.append(runner.optim_wrapper.param_groups[0]['lr'])
                scheduler.step()
        return rates


class Two(torch.nn.Module):
    """A model of two weights with the `trainables` of an SDXL."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def trainables(self) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
        return {'adapter': [('weight', self.weight)]}
