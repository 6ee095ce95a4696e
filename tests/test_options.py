"""Each option of diffusers' train_t2i_adapter_sdxl.py has its place: docs/options.md says which, this sets and looks.

The keys come from the table, so that the two cannot drift apart. Parts are built where the effect shows there; what
shows in a run only is read off one run of four steps.
"""

import argparse
import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffengine_sdxl.datasets import Draw
from diffengine_sdxl.engine import config, launch
from diffengine_sdxl.engine.optim import AdapterOptimWrapperConstructor
from diffengine_sdxl.registry import DATASETS, HOOKS, MODELS, RUNNERS, VISUALIZERS
from diffengine_sdxl.testing import write_tiny_sdxl

ROOT = Path(__file__).resolve().parents[1]
FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'
# All that `parse_args` of the script knows (diffusers 0.42).
OPTIONS = '''
    pretrained_model_name_or_path pretrained_vae_model_name_or_path adapter_model_name_or_path revision variant
    tokenizer_name output_dir cache_dir seed resolution detection_resolution crops_coords_top_left_h
    crops_coords_top_left_w train_batch_size num_train_epochs max_train_steps checkpointing_steps
    checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1
    adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32
    report_to mixed_precision enable_xformers_memory_efficient_attention set_grads_to_none dataset_name
    dataset_config_name train_data_dir image_column conditioning_image_column caption_column max_train_samples
    proportion_empty_prompts validation_prompt validation_image num_validation_images validation_steps
    tracker_project_name'''


def read_table() -> dict[str, str]:
    """Option -> what stands in the table's second column, without the quotes."""
    rows = re.findall(r'^\| `(\w+)` \| (?:`([^`]+)`|(none)) \| .*\|$', (ROOT / 'docs' / 'options.md').read_text(), re.M)
    table = {option: here or none for option, here, none in rows}
    assert len(table) == len(rows), 'an option stands twice in docs/options.md'
    return table


TABLE = read_table()
Overrides = dict[str, Any]
CASES: dict[str, tuple[Overrides, Callable[..., None]]] = {}


def case(*options: str, **values: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The check of `options`. `values`: last part of a key -> value in place of the table's."""
    def add(function: Callable[..., None]) -> Callable[..., None]:
        for option in options:
            CASES[option] = (values, function)
        return function
    return add


def test_the_table_holds_every_option() -> None:
    assert sorted(TABLE) == sorted(OPTIONS.split())
    assert sorted(option for option, here in TABLE.items() if here != 'none') == sorted(CASES)


class World:
    """Builds parts of the real config on a tiny base, with an option's overrides."""

    def __init__(self, base: Path, data: Path, tmp: Path, option: str, values: Overrides) -> None:
        self.base, self.data, self.tmp, self.here = base, data, tmp, TABLE[option]
        self.places = {'BASE': base, 'DATA': data, 'DIR': tmp / 'dir'}
        self.overrides: Overrides = {}
        self.name = FILL50K if 'condition.' not in self.here else 'stable_diffusion_xl_t2i_adapter_canny'
        if not self.here.startswith('--'):
            self.overrides = config.parse_overrides(self.here.split())
            for key, value in self.overrides.items():
                self.overrides[key] = values.get(key.rpartition('.')[2], value)

    def config(self, **others: Any) -> Any:
        """The resolved config; the tiny base and data go before the real ones, the option's overrides before all."""
        tiny = {'model.pretrained': str(self.base), 'model.vae': None, 'resolution': 64, 'mixed_precision': 'no',
                'train_dataloader.dataset.source': str(self.data), 'train_dataloader.num_workers': 0,
                'train_cfg.max_iters': 4, **others, **self.overrides}
        return config.load(self.name, {k: self._placed(v) for k, v in tiny.items()})

    def _placed(self, value: Any) -> Any:
        return str(self.places[value]) if isinstance(value, str) and value in self.places else value

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
        """The learning rates of a run of `num` steps, by its own scheduler."""
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
    """A model of two weights that trains as an SDXL does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def trainables(self) -> dict[str, list[tuple[str, torch.nn.Parameter]]]:
        return {'adapter': [('weight', self.weight)]}


@pytest.mark.parametrize('option', CASES)
def test_option(option: str, tiny_base: Path, circles: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    values, check = CASES[option]
    world = World(tiny_base, circles, tmp_path, option, values)
    wanted = check.__code__.co_varnames[1:check.__code__.co_argcount]
    check(world, *(request.getfixturevalue(name) for name in wanted))


# The base and the adapter

@case('pretrained_model_name_or_path')
def base(world: World) -> None:
    world.places['BASE'] = write_tiny_sdxl(world.tmp / 'other', channels=(8, 16, 24))
    assert world.model().unet.config.block_out_channels == [8, 16, 24]


@case('pretrained_vae_model_name_or_path')
def vae(world: World) -> None:
    world.places['VAE'] = write_tiny_sdxl(world.tmp / 'other', vae_blocks=3)
    assert world.model().vae_factor == 4


@case('adapter_model_name_or_path')
def adapter(world: World) -> None:
    from diffusers import T2IAdapter
    net = T2IAdapter(channels=(16, 32, 64, 64), downscale_factor=16, adapter_type='full_adapter_xl')
    net.save_pretrained(world.tmp / 'adapter')
    world.places['ADAPTER'] = world.tmp / 'adapter'
    loaded = world.model().adapters['adapter'].net.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in net.state_dict().items())


@pytest.fixture
def hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub's cache as two revisions of 'some/sdxl' and a data set would leave it, and no network."""
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    repo = tmp_path / 'cache' / 'models--some--sdxl'
    for revision, commit in (('main', 'a' * 40), ('v2', 'b' * 40)):
        folder = repo / 'snapshots' / commit
        if revision == 'main':
            shutil.copytree(tiny_base, folder)
        else:
            write_tiny_sdxl(folder, channels=(8, 16, 24))
        (repo / 'refs').mkdir(exist_ok=True)
        (repo / 'refs' / revision).write_text(commit)
    yield tmp_path / 'cache'


@case('revision')
def revision(world: World, hub: Path) -> None:
    world.places['REVISION'] = Path('v2')
    model = world.model(**{'model.pretrained': 'some/sdxl', 'model.cache_dir': str(hub)})
    assert model.unet.config.block_out_channels == [8, 16, 24]


@case('cache_dir')
def cache_dir(world: World, hub: Path) -> None:
    world.places['CACHE'] = hub
    model = world.model(**{'model.pretrained': 'some/sdxl'})
    assert model.unet.config.block_out_channels == [16, 32, 64]
    assert world.dataset().data.cache_files[0]['filename'].startswith(str(hub))


@case('variant')
def variant(world: World, tiny_base: Path) -> None:
    from diffusers import DiffusionPipeline
    DiffusionPipeline.from_pretrained(tiny_base).save_pretrained(world.tmp / 'base', variant='half')
    world.places['VARIANT'] = Path('half')
    base = {'model.pretrained': str(world.tmp / 'base')}
    assert world.model(**base).unet is not None
    world.overrides.clear()
    with pytest.raises(ValueError, match='could not be loaded'):
        world.model(**base)


@case('tokenizer_name')
def tokenizer(world: World, tiny_base: Path) -> None:
    for name in ('tokenizer', 'tokenizer_2'):
        shutil.copytree(tiny_base / name, world.tmp / 'words' / name)
        path = world.tmp / 'words' / name / 'tokenizer_config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), 'model_max_length': 33}))
    world.places['TOKENIZERS'] = world.tmp / 'words'
    model = world.model()
    assert (model.tokenizer.model_max_length, model.tokenizer_2.model_max_length) == (33, 33)


@case('gradient_checkpointing')
def gradient_checkpointing(world: World) -> None:
    assert world.model().unet.is_gradient_checkpointing


@case('enable_xformers_memory_efficient_attention')
def xformers(world: World) -> None:
    try:
        import xformers as package
    except ImportError:
        package = None
    if package is None:
        with pytest.raises(ValueError, match='needs the package xformers'):
            world.model()
    else:
        assert any('XFormers' in type(p).__name__ for p in world.model().unet.attn_processors.values())


@case('mixed_precision')
def mixed_precision(world: World) -> None:
    model = world.model()
    assert (model.compute_dtype, model.unet.dtype, model.vae.dtype) == (torch.float16, torch.float16, torch.float32)
    assert world.optim_wrapper().loss_scaler is not None


@case('allow_tf32')
def allow_tf32(world: World) -> None:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [b.allow_tf32 for b in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        world.runner()
        assert all(b.allow_tf32 for b in backends)
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


# The data

@case('dataset_name', 'train_data_dir')
def dataset_name(world: World) -> None:
    assert len(world.dataset()) == 16


def write_rows(world: World, names: tuple[str, str, str] = ('image', 'conditioning_image', 'text'), num: int = 3,
               name: str = 'train') -> Path:
    """A jsonl of `num` rows with columns of these names, beside the pictures that it points to."""
    folder = world.tmp / 'rows'
    if not folder.exists():
        shutil.copytree(world.data, folder, ignore=shutil.ignore_patterns('metadata.jsonl'))
    rows = [dict(zip(names, (f'images/{i:05d}.png', f'conditioning_images/{i:05d}.png', f'caption {i}'), strict=True))
            for i in range(num)]
    path = folder / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


@case('dataset_config_name', name='few')
def dataset_config_name(world: World) -> None:
    for name, num in (('many', 5), ('few', 2)):
        folder = write_rows(world, num=num, name=name).parent
    (folder / 'README.md').write_text('---\nconfigs:\n- config_name: many\n  data_files: many.jsonl\n'
                                      '- config_name: few\n  data_files: few.jsonl\n---\n')
    world.data = folder
    assert len(world.dataset()) == 2


@case('image_column', image_column='picture')
def image_column(world: World) -> None:
    world.data = write_rows(world, ('picture', 'conditioning_image', 'text'))
    assert world.sample()['img'].shape == (3, 64, 64)


@case('conditioning_image_column', conditioning_image_column='edges')
def conditioning_image_column(world: World) -> None:
    world.data = write_rows(world, ('image', 'edges', 'text'))
    assert world.sample()['conditioning_image'].shape == (3, 64, 64)


@case('caption_column', caption_column='words')
def caption_column(world: World) -> None:
    world.data = write_rows(world, ('image', 'conditioning_image', 'words'))
    assert world.sample()['text'] == 'caption 0'


@case('max_train_samples')
def max_train_samples(world: World) -> None:
    assert len(world.dataset()) == 4


@case('proportion_empty_prompts')
def proportion_empty_prompts(world: World) -> None:
    dataset = world.dataset()
    texts = [dataset[Draw(i, epoch, 0)]['text'] for i in range(16) for epoch in range(20)]
    assert 0.05 < texts.count('') / len(texts) < 0.15


@case('resolution', resolution=32)
def resolution(world: World) -> None:
    sample = world.sample()
    assert sample['img'].shape == sample['conditioning_image'].shape == (3, 32, 32)
    assert sample['time_ids'].tolist() == [64, 64, 0, 0, 32, 32]
    assert world.resolved().default_hooks.samples.size == 32


@case('detection_resolution', detection_resolution=16)
def detection_resolution(world: World) -> None:
    at_16 = world.sample()['conditioning_image']
    world.overrides['condition.detection_resolution'] = None
    assert not torch.equal(at_16, world.sample()['conditioning_image'])


@case('crops_coords_top_left_h', 'crops_coords_top_left_w', crops_coords_top_left=(5, 7))
def crops(world: World) -> None:
    assert world.sample()['time_ids'].tolist() == [64, 64, 5, 7, 64, 64]


@case('train_batch_size')
def train_batch_size(world: World) -> None:
    runner = world.runner()
    assert len(next(iter(runner.build_dataloader(runner._train_dataloader, seed=0)))['text']) == 4


@case('dataloader_num_workers', num_workers=2)
def dataloader_num_workers(world: World) -> None:
    runner = world.runner()
    assert runner.build_dataloader(runner._train_dataloader, seed=0).num_workers == 2


# The optimizer

@case('max_train_steps', max_iters=7)
def max_train_steps(world: World) -> None:
    runner = world.runner()
    assert runner.build_train_loop(runner._train_loop).max_iters == 7


@case('num_train_epochs')
def num_train_epochs(world: World) -> None:
    runner = world.runner()
    assert runner.build_train_loop(runner._train_loop).max_iters == 2 * 16 // 4  # 4 samples a step


@case('gradient_accumulation_steps', accumulative_counts=3)
def gradient_accumulation_steps(world: World) -> None:
    wrapper = world.optim_wrapper()
    weight = wrapper.param_groups[0]['params'][0]
    steps = []
    for _ in range(6):
        before = weight.detach().clone()
        wrapper.update_params(weight.sum())
        steps.append(not torch.equal(before, weight))
    assert steps == [False, False, True] * 2


@case('learning_rate', lr=3e-4)
def learning_rate(world: World) -> None:
    assert world.group()['lr'] == 3e-4


@case('scale_lr')
def scale_lr(world: World) -> None:
    runner = world.runner(**{'train_dataloader.batch_size': 2})
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    assert wrapper.param_groups[0]['lr'] == pytest.approx(1e-5 * 2 * 4)  # batch size x accumulation


def diffusers_rates(num: int, name: str, **options: Any) -> list[float]:
    from diffusers.optimization import get_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_training_steps=num, **{'num_warmup_steps': 0, **options})
    rates = []
    for _ in range(num):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    return rates


@case('lr_scheduler')
def lr_scheduler(world: World) -> None:
    assert world.rates(8) == pytest.approx(diffusers_rates(8, 'cosine'), abs=0)


@case('lr_warmup_steps', num_warmup_steps=3)
def lr_warmup_steps(world: World) -> None:
    world.overrides['param_scheduler.name'] = 'constant_with_warmup'
    rates = world.rates(8)
    assert rates == diffusers_rates(8, 'constant_with_warmup', num_warmup_steps=3) and rates[:2] == [0, 1 / 3]


@case('lr_num_cycles', num_cycles=2)
def lr_num_cycles(world: World) -> None:
    world.overrides['param_scheduler.name'] = 'cosine_with_restarts'
    rates = world.rates(8)
    assert rates == diffusers_rates(8, 'cosine_with_restarts', num_cycles=2) and rates.count(1.0) == 2


@case('lr_power')
def lr_power(world: World) -> None:
    world.overrides['param_scheduler.name'] = 'polynomial'
    rates = world.rates(8)
    assert rates == diffusers_rates(8, 'polynomial', power=2.0) and rates != diffusers_rates(8, 'polynomial')


@case('use_8bit_adam')
def use_8bit_adam(world: World) -> None:
    try:
        import bitsandbytes
    except ImportError:
        with pytest.raises(ValueError, match='needs the package bitsandbytes'):
            world.optim_wrapper()
    else:
        assert isinstance(world.optim_wrapper().optimizer, bitsandbytes.optim.AdamW8bit)


@case('adam_beta1', 'adam_beta2', betas=(0.8, 0.95))
def adam_betas(world: World) -> None:
    assert tuple(world.group()['betas']) == (0.8, 0.95)


@case('adam_weight_decay', weight_decay=0.5)
def adam_weight_decay(world: World) -> None:
    assert world.group()['weight_decay'] == 0.5


@case('adam_epsilon', eps=1e-3)
def adam_epsilon(world: World) -> None:
    assert world.group()['eps'] == 1e-3


@case('max_grad_norm', max_norm=0.25)
def max_grad_norm(world: World) -> None:
    wrapper = world.optim_wrapper()
    weight = wrapper.param_groups[0]['params'][0]
    weight.grad = torch.tensor([30.0, 40.0])
    wrapper.step()
    assert float(weight.grad.norm()) == pytest.approx(0.25, rel=1e-4)


@case('set_grads_to_none')
def set_grads_to_none(world: World) -> None:
    for wanted in (True, False):
        world.overrides['optim_wrapper.set_grads_to_none'] = wanted
        wrapper = world.optim_wrapper()
        weight = wrapper.param_groups[0]['params'][0]
        weight.grad = torch.ones(2)
        wrapper.zero_grad()
        assert (weight.grad is None) == wanted


# The run

def parsed(*arguments: str) -> argparse.Namespace:
    """What tools/train.py makes of a command line."""
    import runpy
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py', FILL50K, *arguments])
        patch.setattr(launch, 'train', lambda args: found.append(args) or 0)
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')
    return found[0]


@case('output_dir')
def output_dir(world: World) -> None:
    flag, _ = world.here.split()
    assert launch.prepare(parsed(flag, 'some/where')).work_dir == 'some/where'
    assert launch.prepare(parsed()).work_dir == f'work_dirs/{FILL50K}'


@case('seed')
def seed(world: World) -> None:
    runner = world.runner()
    assert runner.seed == runner.model.seed == 42


@pytest.fixture(scope='module')
def run(tiny_base: Path, circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work_dir of four steps; each key comes from the table and does something else than its default."""
    folder = tmp_path_factory.mktemp('run')
    image = circles / 'conditioning_images' / '00003.png'
    values: Overrides = {
        'max_train_steps': 4, 'checkpointing_steps': 1, 'checkpoints_total_limit': 2, 'validation_steps': 2,
        'num_validation_images': 3, 'validation_prompt': ['red circle', 'blue circle'],
        'validation_image': [str(image), str(image)]}
    overrides = {TABLE[option].split()[-1].partition('=')[0]: value for option, value in values.items()}
    cfg = config.load(FILL50K, {
        'model.pretrained': str(tiny_base), 'model.vae': None, 'resolution': 64, 'mixed_precision': 'no',
        'train_dataloader.dataset.source': str(circles), 'train_dataloader.num_workers': 0,
        'model.sampler.num_inference_steps': 2, 'optim_wrapper.accumulative_counts': 1, **overrides})
    cfg.work_dir = str(folder)
    RUNNERS.build(cfg).train()
    return folder


@case('checkpointing_steps', 'checkpoints_total_limit')
def checkpoints(world: World, run: Path) -> None:
    assert sorted(p.name for p in run.glob('step*.pth')) == ['step3.pth', 'step4.pth']


@case('validation_steps', 'validation_prompt', 'validation_image', 'num_validation_images')
def samples(world: World, run: Path) -> None:
    assert sorted(p.name for p in (run / 'samples').iterdir()) == ['step2.png', 'step4.png']
    width, height = Image.open(run / 'samples' / 'step4.png').size
    # Cells of 128 pixels: condition and three pictures side by side, one row for each of two prompts.
    assert 4 * 128 < width < 5 * 128 and 2 * 128 < height < 3 * 128


@case('resume_from_checkpoint')
def resume(world: World, run: Path) -> None:
    assert launch.prepare(parsed(world.here)).resume is True
    work_dir = shutil.copytree(run, world.tmp / 'run')
    (work_dir / 'step4.pth').unlink()
    for arguments in ([], [str(work_dir / 'step3.pth')]):
        cfg = config.load(next(work_dir.glob('*.py')))
        cfg.resume = launch.prepare(parsed(world.here, *arguments)).resume
        cfg.work_dir, cfg.experiment_name = str(work_dir), f'resume {len(arguments)}'
        RUNNERS.build(cfg).train()
        steps = [json.loads(line)['step'] for line in (work_dir / 'curves.jsonl').read_text().splitlines()]
        assert steps == [1, 2, 3, 4] and (work_dir / 'step4.pth').is_file()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the optional package wandb, and the arguments of each `wandb.init`."""
    calls: list[dict[str, Any]] = []
    module = types.ModuleType('wandb')
    module.init = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    module.log = lambda *_, **__: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return calls


def visualizer(world: World) -> Any:
    from mmengine.visualization import Visualizer
    cfg = dict(world.resolved().visualizer)
    built = VISUALIZERS.build({**cfg, 'name': str(world.tmp), 'save_dir': str(world.tmp)})
    assert isinstance(built, Visualizer)
    built.add_scalar('loss', 1.0, 1)
    return built


@case('report_to')
def report_to(world: World, wandb: list[dict[str, Any]]) -> None:
    assert set(visualizer(world)._vis_backends) == {'LocalVisBackend', 'WandbVisBackend'} and len(wandb) == 1


@case('tracker_project_name')
def tracker_project_name(world: World, wandb: list[dict[str, Any]]) -> None:
    visualizer(world)
    assert wandb[0]['project'] == 'PROJECT'


@case('logging_dir')
def logging_dir(world: World) -> None:
    visualizer(world)
    assert list((world.tmp / 'dir').glob('events.out.tfevents.*'))


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What would be uploaded, in place of the upload: (repository, folder)."""
    import huggingface_hub
    found: list[tuple[str, str]] = []
    monkeypatch.setattr(huggingface_hub, 'create_repo',
                        lambda name, **_: types.SimpleNamespace(repo_id=name if '/' in name else f'me/{name}'))
    monkeypatch.setattr(huggingface_hub, 'upload_folder',
                        lambda repo_id, folder_path, **_: found.append((repo_id, folder_path)))
    return found


@case('push_to_hub', 'hub_model_id')
def push_to_hub(world: World, uploads: list[tuple[str, str]], run: Path) -> None:
    import logging
    hook = HOOKS.build(dict(world.resolved().default_hooks.hub))
    hook.after_run(types.SimpleNamespace(work_dir=str(run), max_iters=4, logger=logging.getLogger('uploads')))
    name = 'OWNER/NAME' if 'repo_id' in world.here else f'me/{run.name}'
    assert uploads == [(name, str(run / 'step4'))]
