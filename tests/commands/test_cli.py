"""The command line itself: help, options, mistakes; answered at once, and told to torchrun too."""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import diffengine_sdxl
from diffengine_sdxl import config_files, errors
from diffengine_sdxl.commands import cli, options
from diffengine_sdxl.commands.cli import COMMANDS, main, parse

ROOT = Path(__file__).resolve().parents[2]
CONFIG = 'stable_diffusion_xl_t2i_adapter_fill50k'
#: The arguments that each command cannot do without.
NEEDED = {'train': ['C'], 'test': ['C', 'W'], 'infer': ['C'], 'export': ['C', 'O'], 'cache': ['C'],
          'plan': ['C'], 'data': ['C'], 'list': [], 'write-shapes': ['F']}
Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; return its exit code, output, and errors."""
    def run(*arguments: str) -> SimpleNamespace:
        capsys.readouterr()
        try:
            code: Any = main(arguments=arguments)
        except SystemExit as stop:
            code = stop.code
        said, told = capsys.readouterr()
        return SimpleNamespace(code=code, said=said, told=told)
    return run


def test_help_and_version(run: Run) -> None:
    for words in ([], ['-h'], ['--help']):
        done = run(*words)
        assert done.code == 0 and done.told == '' and done.said.startswith('usage: diffengine-sdxl COMMAND [options]')
        assert all(f'  {name} ' in done.said and command.description in done.said for name, command in COMMANDS.items())
    assert vars(run('--version')) == dict(code=0, said=f'{diffengine_sdxl.__version__}\n', told='')


@pytest.mark.parametrize('command', COMMANDS)
def test_the_help_of_each_command(command: str, run: Run) -> None:
    """It lists all its options with a text each, also with other arguments around it."""
    for words in (['-h'], ['C', '--help', '--unknown']):
        done = run(command, *words)
        text = ' '.join(done.said.split())
        assert done.code == 0 and done.told == '' and f' {COMMANDS[command].description} ' in text
        assert text.startswith(f'usage: diffengine-sdxl {command} ')
    parser = cli.Parser(command, '')
    COMMANDS[command].add_options(parser)
    assert [a.dest for a in parser._actions if not a.help] == []
    flags = {flag for a in parser._actions for flag in a.option_strings if a.help != argparse.SUPPRESS}
    assert '_' not in ''.join(flags) and flags <= set(re.findall(r'(?<!\S)--?[\w-]+', text))


def mistakes() -> list[tuple[list[str], str]]:
    """Wrong command lines, and the sentence for each."""
    train, infer = ['train', CONFIG], ['infer', CONFIG]
    return [
        (['trian'], "unknown command 'trian'. Did you mean 'train'? 'diffengine-sdxl -h' lists them."),
        (['x'], "unknown command 'x'. 'diffengine-sdxl -h' lists them."),
        (['train'], "the following arguments are required: config. 'diffengine-sdxl train -h' lists the options."),
        ([*train, 'b'], "'b' is one argument too many."), (['list', '--all'], "unknown option '--all'. 'diff"),
        ([*train, '--cfg-options'], 'argument --cfg-options: expected at least one argument.'),
        ([*train, '--launcher', 'ssh'], "argument --launcher: invalid choice: 'ssh' (choose from 'none', "),
        # Another tool's option, with the value; the nearest of its own; or nothing is near.
        ([*train, '--learning_rate', '1e-4'], "unknown option '--learning-rate'. In this project it is `--cfg-options "
                                              'optim_wrapper.optimizer.lr=1e-4`.'),
        ([*train, '--learning_rate=1e-4'], 'is `--cfg-options optim_wrapper.optimizer.lr=1e-4`.'),
        ([*train, '--learning_rate', '--resume'], 'is `--cfg-options optim_wrapper.optimizer.lr=1e-5`.'),
        ([*train, '--work-dri', 'W'], "unknown option '--work-dri'. Did you mean '--work-dir'?"),
        ([*train, '--work'], "unknown option '--work'."),  # no abbreviations
        ([*train, '--zzz', '1'], "unknown option '--zzz'. 'diffengine-sdxl train -h'"),
        ([*train, '-x'], "unknown option '-x'. 'diffengine-sdxl train -h'"),
        ([*infer, '--controlnet_conditioning_scale=0.3'], "In this project it is `--scales NAME=0.3`."),
        ([*infer, '--cfg_scale', '3'], 'In this project it is `--guidance-scale 3`.'),
        ([*infer, '--promt', 'a'], "unknown option '--promt'. Did you mean '--prompt' or"),
        ([*infer, '--batch-size', 'x'], "argument --batch-size: invalid int value: 'x'."),
        (['test', CONFIG], 'name the weights: --checkpoint W, where W is a work dir')]


@pytest.mark.parametrize(('words', 'sentence'), mistakes(), ids=lambda x: ' '.join(x) if isinstance(x, list) else None)
def test_mistakes(words: list[str], sentence: str, run: Run) -> None:
    """One line, exit code 2."""
    done = run(*words)
    assert (done.code, done.said) == (2, '') and sentence in done.told
    assert done.told.startswith('error: ') and done.told.count('\n') == 1 and '..' not in done.told.replace('...', '')


@pytest.mark.parametrize('words', [['train', CONFIG], ['test', CONFIG, 'none']], ids=' '.join)
def test_a_work_dir_that_is_a_file(words: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is imported or made; a new folder and one that exists are not."""
    (file := tmp_path / 'FILE').touch()
    monkeypatch.setattr(errors, 'run_command', lambda *_: 0)
    for path in (file, file / 'x'):
        done = run(*words, '--work-dir', str(path))
        assert done.code == 1 and done.told.startswith(f"error: --work-dir {path}: '{file}' is a file; name")
    for path in (tmp_path, tmp_path / 'x' / 'y'):
        assert run(*words, '--work-dir', str(path)).code == 0


def test_hyphens_and_underscores_are_one() -> None:
    """In names of options; values stay."""
    args = parse('infer', ['C', '--negative_prompt=a_b=c_d', '--batch_size', '3', '--cfg_options=a_b.c_d=e_f',
                           '--num_inference_steps', '4', '--prompt', '__a_b'])
    assert (args.negative_prompt, args.batch_size, args.num_inference_steps) == ('a_b=c_d', 3, '4')
    assert (args.cfg_options, args.prompt) == (['a_b.c_d=e_f'], ['__a_b'])
    assert parse('train', ['a_b', '--work_dir=W_1', '--local_rank=2']).work_dir == 'W_1'
    assert parse('train', ['C', '--local-rank', '2']).local_rank == 2


def test_what_is_repeated_adds_up() -> None:
    args = parse('infer', ['C', '--prompt', 'a', 'b', '--prompt', 'c', '--set', 'seed=1', 'eta=1', '--set', 'seed=2',
                           '--cfg-options', 'a=1', '--cfg-options', 'b=2', 'c=3', '--scales', 'x=1', '--scales', 'y=2',
                           '--image', 'i.png', '--image', 'j.png', '--steps', '3', '--steps', '4'])
    assert (args.prompt, args.set) == (['a', 'b', 'c'], ['seed=1', 'eta=1', 'seed=2'])
    assert args.cfg_options == ['a=1', 'b=2', 'c=3']
    assert options.given_settings(args) == dict(scales=dict(x=1, y=2), image=['i.png', 'j.png'], num_inference_steps=4)
    assert options.set_settings(args.set) == dict(seed=2, eta=1)
    for command in ('train', 'test', 'export', 'cache'):
        both = parse(command, [*NEEDED[command], '--cfg-options', 'a=1', '--cfg-options', 'b=2'])
        assert both.cfg_options == ['a=1', 'b=2']


def test_weights_to_test_have_two_forms() -> None:
    for words in (['C', 'X'], ['C', '--checkpoint', 'X'], ['--checkpoint=X', 'C']):
        assert parse('test', words).checkpoint == 'X'


def test_every_command_reaches_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its options; only where its first argument is a config or a PNG is that looked for."""
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(errors, 'run_command', lambda name, args: calls.append((name, args)) or 7)
    monkeypatch.setenv('LOCAL_RANK', '5')
    for command, needed in NEEDED.items():
        words = [CONFIG if word == 'C' else word for word in needed]
        assert main(command, words) == main(arguments=[command, *words]) == 7
        path = ROOT / 'diffengine_sdxl' / 'commands' / calls[-1][0]
        assert path.with_suffix('.py').is_file() or (path / 'command.py').is_file()
    assert [name for name, _ in calls[::2]] == ['train', 'test', 'infer', 'export', 'cache', 'plan', 'data',
                                                'list_configs', 'write_shapes']
    assert main('infer', ['there is none.PNG']) == 7 and main('train', ['nope']) == 1
    assert main('write-shapes', ['F', '--conditioning', 'none']) == 7 and calls[-1][1].conditioning is None


def test_list(run: Run) -> None:
    """By folder, each with its first line; words narrow it down, in any case."""
    everything = run('list')
    paths = config_files.installed_configs()
    assert everything.code == 0 and everything.told == ''
    lines = everything.said.splitlines()
    assert [line.split()[0] for line in lines if line.startswith('  ')] == [path.stem for path in sorted(
        paths, key=lambda path: (path.parent, path.name))]
    assert lines[-1] == f'{len(paths)} configs in {config_files.configs_folder()}'
    assert all(config_files.description(path) for path in paths)
    some = run('list', 'LoRA', 'shapes').said.splitlines()
    assert 'shapes/' in some and any(line.startswith('  shapes_lora ') for line in some)
    assert all('lora' in line.lower() for line in some if line.startswith('  ')) and len(some) < len(lines)
    # Words of the folder, the name and the description together.
    assert any('stable_diffusion_xl_lora_dreambooth' in line for line in run('list', 'lora', 'ruiz').said.splitlines())
    none = run('list', 'lora', 'nosuch')
    assert (none.code, none.said) == (1, '')
    assert none.told == "error: No installed config has 'lora' and 'nosuch' in its name or description.\n"


def test_the_first_line_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / 'c.py'
    for text, line in (('"""One.\n\nTwo."""', 'One.'), ('x = 1', ''), ('', '')):
        path.write_text(text)
        assert config_files.description(path) == line
    path.write_text('x = (')
    with pytest.raises(errors.UserError, match="c.py' cannot be read: '\\(' was never closed"):
        config_files.description(path)


HEAVY = ('torch', 'mmengine', 'numpy', 'diffusers', 'PIL')


@pytest.mark.parametrize(('words', 'code', 'said', 'names'), [
    ('-h', 0, 'usage: ', False), ('train -h', 0, 'usage: ', False), ('infer -h', 0, 'usage: ', True),
    ('train nope.py', 1, "error: There is no config file 'nope.py' and no installed config of that name.", False),
    (f'infer {CONFIG}l --prompt a', 1, f"Did you mean '{CONFIG}'", True),
    (f'train {CONFIG} --learning_rate 3', 2, 'optim_wrapper.optimizer.lr=3', True), ('list lora', 0, 'lora/', False)])
def test_answered_without_the_heavy_imports(words: str, code: int, said: str, names: bool, tmp_path: Path) -> None:
    """Neither torch nor mmengine; the names of other tools only for a hint, and for what a request may hold."""
    script = ('import sys\nfrom diffengine_sdxl.commands.cli import main\ntry:\n    code = main()\n'
              'except SystemExit as stop:\n    code = stop.code\n'
              f'print([m for m in {HEAVY} if m in sys.modules], "diffengine_sdxl.field_names" in sys.modules, code)')
    done = subprocess.run([sys.executable, '-c', script, *words.split()], capture_output=True, text=True, cwd=tmp_path,
                          env={'PYTHONPATH': str(ROOT)}, check=True)
    assert said in done.stdout + done.stderr and done.stdout.splitlines()[-1] == f'[] {names} {code}'


@pytest.mark.parametrize('words', [[sys.executable, '-m', 'diffengine_sdxl'],
                                   [str(Path(sys.executable).with_name('diffengine-sdxl'))]])
def test_as_a_module_and_as_a_script(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run([*words, 'train', 'nope.py'], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '') and done.stderr.startswith("error: There is no config file 'nope")


@pytest.mark.parametrize(('words', 'sentence'), [
    ([CONFIG, '--lerning-rate', '3'], "error: unknown option '--lerning-rate'."),
    ([CONFIG, '--cfg-options', 'resolutoin=3'], "error: --cfg-options 'resolutoin': the config has no key 'resolutoin'."
                                                " Did you mean 'resolution'?")])
def test_torchrun_ends_with_the_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    """Its own words come after the process's; what we wrote for it comes last of these."""
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone',
                           str(ROOT / 'tools' / 'train.py'), *words, '--launcher', 'pytorch'], cwd=tmp_path, text=True,
                          capture_output=True, env={'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
                          timeout=120)
    assert done.returncode == 1 and sentence in ' '.join(done.stderr.splitlines()[-3:]), done.stderr[-3000:]
