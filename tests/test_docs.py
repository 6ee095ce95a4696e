"""The docs are true: the README's tree names every file, and every command and example runs or at least parses."""

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffengine_sdxl import config, errors
from diffengine_sdxl.commands import cli
from diffengine_sdxl.commands.common import load_config
from diffengine_sdxl.commands.test import to_test_config
from diffengine_sdxl.errors import run_command
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_image_encoder

ROOT = Path(__file__).resolve().parents[1]
PAGES = ['README.md', 'CONTRIBUTING.md', 'configs/t2i_adapter/README.md', 'configs/infer/README.md',
         *sorted(f'docs/{p.name}' for p in (ROOT / 'docs').glob('*.md'))]
FOLDERS = ('diffengine_sdxl', 'configs', 'tools', 'benchmarks', 'docs')
FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language in a page."""
    return re.findall(rf'^```{language}\n(.*?)^```', (ROOT / page).read_text(), re.M | re.S)


# The tree

def tree(text: str) -> dict[str, str]:
    """Path -> description of the README's tree; folders end in '/'. Two blanks a level, and before the words."""
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in text.splitlines():
        match = re.fullmatch(r'((?:  )*)(\S+)(?:  +(\S.*))?', line)
        assert match, f'README.md, the tree: cannot read {line!r}'
        depth, name, words = len(match[1]) // 2, match[2], match[3] or ''
        path = ''.join(parents[:depth]) + name
        assert path not in found, f'README.md, the tree names {path} twice'
        found[path] = words
        parents[depth:] = [name] if name.endswith('/') else []
    return found


def files() -> set[str]:
    """All files of the repository below FOLDERS, new ones too, without the __init__.py files."""
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', *FOLDERS], cwd=ROOT, capture_output=True,
                            text=True)
    paths = set(listed.stdout.split()) if listed.returncode == 0 and listed.stdout else {
        p.relative_to(ROOT).as_posix() for folder in FOLDERS for p in (ROOT / folder).rglob('*')
        if p.is_file() and not {'.mim', '__pycache__'} & set(p.parts)}
    return {p for p in paths if (ROOT / p).is_file() and Path(p).name != '__init__.py'}


def test_the_readmes_tree_is_that_of_the_files() -> None:
    text, = (b for b in blocks('README.md', 'text') if b.startswith('diffengine_sdxl/'))
    named, existing = tree(text), files()
    described = tuple(path for path, words in named.items() if path.endswith('/') and words)
    missing = sorted(p for p in existing if p not in named and not p.startswith(described))
    surplus = sorted(p for p in named if p not in existing and not (
        p.endswith('/') and any(e.startswith(p) for e in existing)))
    assert not missing and not surplus, (
        'The tree in README.md is not that of the files.\n'
        + ''.join(f'  add     {p}\n' for p in missing) + ''.join(f'  remove  {p}\n' for p in surplus))
    assert not [p for p, words in named.items() if not words and p not in ('diffengine_sdxl/', 'configs/')]


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r'\]\((?!https?:)([^)\s]+)\)', (ROOT / page).read_text()):
            path, _, anchor = target.partition('#')
            found = (ROOT / page).parent / path if path else ROOT / page
            text = found.read_text() if found.suffix == '.md' and found.is_file() else ''
            headings = re.findall(r'^#+ (.*)$', text, re.M)
            anchors = {re.sub(r'[^\w\- ]', '', h).lower().replace(' ', '-') for h in headings}
            if not found.exists() or (anchor and anchor not in anchors):
                broken.append(f'{page}: {target}')
    assert not broken, broken


def test_every_page_is_linked_and_every_benchmark_described() -> None:
    readme = (ROOT / 'README.md').read_text()
    assert not [p for p in PAGES if p.startswith('docs/') and f'({p})' not in readme]
    described = (ROOT / 'docs' / 'benchmarks.md').read_text()
    scripts = [p.name for p in (ROOT / 'benchmarks').glob('*.py') if 'def main' in p.read_text()]
    assert not [name for name in scripts if f'benchmarks/{name}' not in described]


def test_dependencies_are_those_of_the_package() -> None:
    text = (ROOT / 'pyproject.toml').read_text()
    table = (ROOT / 'docs' / 'dependencies.md').read_text()
    listed = re.search(r'^dependencies = \[(.*?)^\]', text, re.S | re.M)
    assert listed
    required = re.findall(r"^\s+'([\w-]+)", listed[1], re.M)
    assert Counter(re.findall(r'^\| `([\w-]+)` \| [^|]+ \|$', table, re.M)) == Counter(required)
    extras = re.search(r'^\[project.optional-dependencies\]\n(.*?)\n\n', text, re.S | re.M)
    assert extras
    for line in extras[1].splitlines():
        name, _, packages = line.partition(' = ')
        row = re.search(rf'^\| `{name}` \| ([^|]+) \|', table, re.M)
        assert row, name
        assert sorted(row[1].split(', ')) == sorted(re.findall(r"'([\w-]+)", packages))


# The commands

def commands(page: str) -> Iterator[str]:
    """The commands of a page's bash blocks, comments left out, continued lines joined."""
    for block in blocks(page, 'bash'):
        for line in block.replace('\\\n', ' ').splitlines():
            if line.strip() and not line.startswith('#'):
                yield line.strip()


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.fixture(scope='module')
def place(tiny_base: Path, circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in: BASE and DATA are a tiny SDXL and drawn circles, STYLE is a LoRA of that base."""
    folder = tmp_path_factory.mktemp('docs')
    shutil.copytree(tiny_base, folder / 'BASE')
    shutil.copytree(circles, folder / 'DATA')
    write_tiny_image_encoder(folder / 'ENCODER')
    model = SDXL(pretrained=str(tiny_base), adapters=dict(style=dict(type='LoRA', rank=2)))
    model.adapters['style'].save(folder / 'STYLE')
    shutil.copy(folder / 'STYLE' / 'pytorch_lora_weights.safetensors', folder / 'STYLE.safetensors')
    return folder


def parsed(tool: str, arguments: list[str]) -> argparse.Namespace:
    """What a tool makes of its command line, or the end of the test if it does not take it."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [tool, *arguments])
        patch.setattr(errors, 'run_command', lambda name, args: found.append(args) or 0)
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    assert found, f'{tool} does not take {arguments}'
    return found[0]


#: (config, options) -> a copy of the work_dir of a new run with them, as several pages have the same one.
_RUNS: dict[tuple[str, ...], Path] = {}


def on_tiny_base(name: str) -> list[str]:
    """What puts an SDXL config on the tiny base and the drawn circles."""
    encoder = ['model.adapters.ip.image_encoder=ENCODER', 'model.adapters.ip.image_encoder_subfolder=None',
               'image_prompt_size=64'] if 'ip_adapter' in name else []
    return ['model.pretrained=BASE', 'model.vae=None', 'train_dataloader.dataset.source=DATA', 'resolution=64',
            'mixed_precision=no', *encoder]


def train(arguments: list[str], place: Path) -> None:
    """Check the command as it is written, then run it on the tiny base: two steps, two more where it resumes."""
    if '--gpus' in arguments:  # mim's own
        at = arguments.index('--gpus')
        del arguments[at:at + 2]
    args = parsed('train.py', arguments)
    load_config(args)
    if args.launcher != 'none':
        return
    steps = 4 if args.resume else 2
    args.resume = args.resume and re.sub(r'step\d+', 'step2', args.resume)
    args.cfg_options = [re.sub(r'step\d+', 'step2', option) for option in args.cfg_options or []]
    own = [f'train_cfg.max_iters={steps}', 'default_hooks.checkpoint.interval=2', 'train_dataloader.num_workers=0',
           'default_hooks.progress=None']
    if config.load(args.config).model.get('sampler'):
        own += ['model.sampler.num_inference_steps=2']
    if args.config.startswith('shapes'):
        own += ['train_dataloader.batch_size=2', 'default_hooks.samples=None']
        starts = {'shapes_pretrain_fine': 'pretrain', 'shapes_pretrain_partial': 'fine'}
        if args.config in starts and 'load_from' not in ' '.join(args.cfg_options):
            own += [f'load_from=work_dirs/{starts[args.config]}/step2.pth']
    elif not args.config.startswith('tiny'):
        own += on_tiny_base(args.config)
    if 'condition' in config.load(args.config):
        own += ['condition.detection_resolution=32']
        if 'depth' in args.config:
            return  # needs a depth model; tests/test_configs.py runs the variants' transforms
    asked = args.cfg_options or []
    for name, adapter in (config.load(args.config).model.get('adapters') or {}).items():
        key, weights = f'model.adapters.{name}.weights', str((adapter or {}).get('weights'))
        if weights.startswith('work_dirs/') and not [option for option in asked if option.startswith(key)]:
            own += [f'{key}={re.sub(r"step[0-9]+", "step2", weights)}']
    args.cfg_options = [*asked, *own]
    work_dir = load_config(args).work_dir
    run = (args.config, *args.cfg_options)
    if run in _RUNS and not args.resume:  # of another page, on the same base and data
        shutil.copytree(_RUNS[run], place / work_dir)
    else:
        assert run_command('train', args) == 0
    if not args.resume and run not in _RUNS:
        _RUNS[run] = shutil.copytree(place / work_dir, place.parent / f'run {len(_RUNS)}')
    exported = place / work_dir / f'step{steps}'
    assert (exported / 'manifest.json').is_file()
    assert any((exported / name).is_file() for name in (
        'adapter/config.json', 'layout/config.json', 'pipeline/model_index.json', 'image_encoder/config.json',
        'style/pytorch_lora_weights.safetensors', 'ip/ip_adapter.safetensors'))


def evaluate(arguments: list[str], place: Path) -> None:
    """Check the command as it is written, then run it on four samples. Steps that were not trained are step 2."""
    if '--gpus' in arguments:
        at = arguments.index('--gpus')
        del arguments[at:at + 2]
    args = parsed('test.py', arguments)
    args.checkpoint = re.sub(r'step\d+', 'step2', args.checkpoint)
    args.compare = args.compare and re.sub(r'step\d+', 'step2', args.compare)
    args.cfg_options = [re.sub(r'step\d+', 'step2', option) for option in args.cfg_options or []]
    to_test_config(load_config(args), args.checkpoint)
    if args.launcher != 'none':
        return
    short = ['test_dataloader.dataset.length=4'] if args.config.startswith('shapes') else [
        'test_dataloader.sampler.max_samples=2', 'test_dataloader.num_workers=0', *on_tiny_base(args.config)]
    args.cfg_options = [*(args.cfg_options or []), *short, 'model.sampler.num_inference_steps=2']
    work_dir = to_test_config(load_config(args), args.checkpoint).work_dir
    assert run_command('test', args) == 0
    found = json.loads((place / work_dir / 'metrics.json').read_text())
    sets = ['base'] if args.checkpoint == 'none' else ['base', 'adapted', *(['compared'] if args.compare else [])]
    # Each adapter alone, whose retention is measured, stands between; the differences follow.
    assert [name for name in found if not name.startswith('only_')][:len(sets)] == sets


def make_pictures(arguments: list[str], place: Path) -> None:
    """Check the command as it is written, then run it in two steps: on the base of the shapes, or on a tiny one."""
    args = parsed('infer.py', arguments)
    if Path(args.config).suffix != '.png':
        args.num_inference_steps = '2'
        sdxl = config.load(args.config).model.pretrained != 'diffengine_sdxl::shapes/base'
        own = ['model.pretrained=BASE', 'model.vae=None', 'mixed_precision=no'] if sdxl else []
        args.cfg_options = [*(args.cfg_options or []), *own]
        args.height, args.width = args.height and '64', args.width and '64'
    assert run_command('infer', args) == 0
    if args.out:
        assert (place / args.out / 'index.html').is_file() and any((place / args.out).glob('00000-*.png'))


def run_tool(words: list[str], folder: Path) -> None:
    """A tool of another kind, in this process; where it would take minutes, with small numbers."""
    tool, arguments = words[1], [re.sub(r'step\d+', 'step2', word) for word in words[2:]]
    if '--num-samples' in arguments:
        arguments[arguments.index('--num-samples') + 1] = '4'
    if tool == 'tools/demo.py':
        arguments += ['--cfg-options', 'train_cfg.max_iters=2', 'test_dataloader.dataset.length=4',
                      'default_hooks.samples=None', 'model.sampler.num_inference_steps=2',
                      'train_dataloader.batch_size=2']
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, 'argv', [tool, *arguments])
        runpy.run_path(str(ROOT / tool), run_name='__main__')
    assert not ended.value.code, words


@pytest.mark.parametrize('page', sorted({page for page, _ in COMMANDS}))
def test_commands_of(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, each in the same folder: what needs a hub, a cluster or several GPUs is parsed only."""
    folder = place / page.replace('/', '-').removesuffix('.md')
    folder.mkdir()
    for name in ('BASE', 'DATA', 'ENCODER'):
        shutil.copytree(place / name, folder / name)
    shutil.copy(place / 'STYLE' / 'pytorch_lora_weights.safetensors', folder / 'STYLE.safetensors')
    shutil.copy(place / 'DATA' / 'conditioning_images' / '00000.png', folder / 'EDGES.png')
    (folder / 'PROMPTS.jsonl').write_text('{"prompt": "a castle", "seed": 3}\n')
    monkeypatch.chdir(folder)
    for command in (c for p, c in COMMANDS if p == page):
        run_shell_line(shlex.split(command), folder)


def run_shell_line(words: list[str], folder: Path) -> None:
    while words and re.fullmatch(r'\w+=\S+', words[0]):
        words = words[1:]
    if words[0] in ('torchrun', 'srun', 'mpirun'):
        at = next(i for i, word in enumerate(words) if re.fullmatch('diffengine.sdxl', word))
        words = ['diffengine-sdxl', *words[at + 1:]]
    if words[0] == 'make':
        assert re.search(rf'^{words[1]}:', (ROOT / 'Makefile').read_text(), re.M), words
    elif words[:3] == ['mim', 'train', 'diffengine_sdxl']:
        train(words[3:], folder)
    elif words[:3] == ['mim', 'test', 'diffengine_sdxl']:
        evaluate(words[3:], folder)
    elif words[:4] == ['mim', 'run', 'diffengine_sdxl', 'infer']:
        make_pictures(words[4:], folder)
    elif words[:2] in (['python', 'tools/train.py'], ['diffengine-sdxl', 'train']):
        train(words[2:], folder)
    elif words[:2] in (['python', 'tools/test.py'], ['diffengine-sdxl', 'test']):
        evaluate(words[2:], folder)
    elif words[:2] in (['python', 'tools/infer.py'], ['diffengine-sdxl', 'infer']):
        make_pictures(words[2:], folder)
    elif words[0] == 'diffengine-sdxl' and words[1] in cli.COMMANDS and words[1] != 'list':
        run_tool(['python', f'tools/{words[1].replace("-", "_")}.py', *words[2:]], folder)
    elif words[0] == 'diffengine-sdxl':
        assert cli.main(None, words[1:]) == 0
    elif words[0] == 'python' and words[1].startswith('tools/'):
        run_tool(words, folder)
    elif words[0] == 'python' and words[1].startswith('benchmarks/'):
        text = (ROOT / words[1]).read_text()
        assert not [w for w in words[2:] if w.startswith('--') and f"'{w}'" not in text], words
    elif words[:4] == ['python', '-m', 'diffengine_sdxl.testing', 'layouts']:
        assert len(words) == 5, words  # tests/adapters/test_layouts.py runs it
    elif words[:3] == ['python', '-m', 'diffengine_sdxl.testing']:
        subprocess.run([sys.executable, *words[1:]], check=True, cwd=folder, capture_output=True)
    elif words[:2] == ['pip', 'install']:
        for extra in re.findall(r'\[(.+)\]', words[-1]):
            assert re.search(rf'^{extra} = ', (ROOT / 'pyproject.toml').read_text(), re.M), words
    elif words[0] in ('tensorboard', 'hf'):
        assert shutil.which(words[0], path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}'), words
    else:
        pytest.fail(f'no rule for the command {words}')


# The examples in Python

SNIPPETS = [(page, i) for page in PAGES for i in range(len(blocks(page, 'python')))]


@pytest.fixture(scope='module')
def trained(place: Path) -> Path:
    """The work_dirs that the examples read from, with an adapter at step 15000."""
    args = parsed('train.py', [FILL50K, '--work-dir', str(place / 'work_dirs' / FILL50K), '--cfg-options',
                               f'model.pretrained={place / "BASE"}', 'model.vae=None', 'resolution=64',
                               f'train_dataloader.dataset.source={place / "DATA"}', 'train_cfg.max_iters=1',
                               'train_dataloader.num_workers=0', 'mixed_precision=no'])
    assert run_command('train', args) == 0
    work_dir = place / 'work_dirs' / FILL50K
    shutil.copytree(work_dir / 'step1', work_dir / 'step15000')
    return work_dir


def tiny(code: str) -> str:
    """An example with the tiny base for SDXL, a circle for the picture of the web, and no GPU."""
    code = code.replace("'stabilityai/stable-diffusion-xl-base-1.0'", "'BASE'")
    code = code.replace("from_pretrained('madebyollin/sdxl-vae-fp16-fix'", "from_pretrained('BASE', subfolder='vae'")
    code = re.sub(r"'https?://[^']*\.png'", "'DATA/conditioning_images/00000.png'", code)
    code = code.replace('(1024, 1024)', '(64, 64)').replace("'cuda'", "'cpu'").replace('torch.float16', 'torch.float32')
    code = code.replace("['train_cfg.max_iters=500']", "['train_cfg.max_iters=1', 'train_dataloader.batch_size=2']")
    return code.replace('num_inference_steps=50', 'num_inference_steps=2')


@pytest.mark.parametrize(('page', 'index'), SNIPPETS)
def test_examples(page: str, index: int, trained: Path, place: Path, tmp_path: Path,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(page, 'python')[index]
    compile(code, page, 'exec')
    if '_base_' in code:
        leaf = "'../_base_/" in code
        code = code.replace("'../_base_/", f"'{ROOT}/configs/_base_/")
        code = re.sub(r"_base_ = \['(\w+\.py)'\]", lambda m: f"_base_ = ['{config.find(m[1])}']", code)
        path = tmp_path / 'own.py'
        path.write_text(code)
        loaded = config.load(path)
        config.resolve(loaded)
        if leaf:
            assert loaded.to_dict() == config.load(FILL50K).to_dict()
        return
    monkeypatch.chdir(place)
    exec(compile(tiny(code), page, 'exec'), {'__name__': 'example'})  # our own pages
