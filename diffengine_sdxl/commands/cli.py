"""The command line of `diffengine-sdxl`, of `python -m diffengine_sdxl`, and of the tools that mim calls.

Parsing imports neither torch nor mmengine, and nothing that it does not need, so -h and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from diffengine_sdxl import __version__, config_files, errors
from diffengine_sdxl.errors import UserError, did_you_mean

PROGRAM = 'diffengine-sdxl'


class Parser(argparse.ArgumentParser):
    """Take '_' in options as '-', and answer options of other tools with this project's."""

    def __init__(self, command: str, description: str, **settings: Any) -> None:
        super().__init__(description=description, allow_abbrev=False, **settings)
        self.command = command

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the parsed options; print one sentence and exit with 2 if they are wrong."""
        args, extra = self.parse_known_args([_with_hyphens(text) for text in arguments])
        if not extra:
            return args
        unknown = [i for i, text in enumerate(extra) if text.startswith('-')]
        if not unknown:
            self.error(f"'{extra[0]}' is one argument too many.")
        sentences = []
        for i, end in zip(unknown, [*unknown[1:], len(extra)], strict=True):
            name, equals, value = extra[i].partition('=')
            values = [value] if equals else extra[i + 1:end]
            hint = self._hint(name, values if len(values) > 1 else values[0] if values else None)
            sentences.append(f"unknown option '{name}'.{hint}")
        self.error('\nerror: '.join(sentences))

    def _hint(self, name: str, value: str | list[str] | None) -> str:
        from diffengine_sdxl.field_names import sampling_hint, training_hint
        if self.command == 'infer':
            hint = sampling_hint(name, value, where='command')
        else:
            hint = training_hint(name, value)
        known = [option for option in self._option_string_actions if option.startswith('--')]
        return hint or did_you_mean(name, known)

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage, which may fill the screen, and exit with 2."""
        stop = '' if message.endswith(('.', '?')) else '.'
        errors.report(f"{message}{stop} '{self.prog} -h' lists the options.")
        sys.exit(2)


class Command(NamedTuple):
    """A command: what it does, its options, and whether its first argument is a config."""

    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    takes_config: bool = True


def _with_hyphens(argument: str) -> str:
    name, equals, value = argument.partition('=')
    return name.replace('_', '-') + equals + value if name.startswith('--') else argument


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help=f"path of a config, or name of an installed one ('{PROGRAM} list')")


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument('--cfg-options', nargs='+', action='extend', metavar='KEY=VALUE',
                        help=f'override keys of the config (docs/configs.md), e.g. {example}')


def _add_launcher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none',
                        help='what starts the processes')
    parser.add_argument('--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def _train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('--work-dir', help='folder for checkpoints, logs and images (default: work_dirs/<config>)')
    parser.add_argument('--resume', nargs='?', const='auto',
                        help='continue from the last checkpoint in the work dir, or from the given one')
    _add_overrides(parser, 'model.adapters.adapter.scale=0.5')
    _add_launcher(parser)


def _test(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    weights = ("a step<N>.pth; a work dir W (its latest), or W/best; an exported step<N>/ or adapter's folder; "
               "'weights' for those that the config names; or 'none' for the base without adapters")
    parser.add_argument('checkpoint', nargs='?', help=weights)
    parser.add_argument('--checkpoint', dest='checkpoint_option', metavar='CHECKPOINT', help='the same')
    parser.add_argument('--compare', metavar='CHECKPOINT', help='measure the difference to a second checkpoint, too')
    parser.add_argument('--work-dir', help='folder for metrics.json, images and logs (default: work_dirs/<config>)')
    _add_overrides(parser, 'test_cfg.seeds=4')
    _add_launcher(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('work_dir', type=Path, help='folder of a training or a test, also of one that still runs')


def _card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('export', type=Path, help='an export step<N>/ in the work dir of its training')
    parser.add_argument('--metrics', type=Path, metavar='METRICS.json', help='results of a test, its metrics.json '
                        "(default: the work dir's, or the validation's of the step)")
    parser.add_argument('--repo-id', metavar='OWNER/NAME', help='of the hub, for the examples of loading')


def _infer(parser: argparse.ArgumentParser) -> None:
    from diffengine_sdxl.commands.options import add_infer_options
    add_infer_options(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('out', type=Path, help='folder to write, or for kohya a file *.safetensors; must not exist')
    parser.add_argument('--checkpoint', help='a step<N>.pth; a work dir (its latest); an exported step<N>/ or '
                                             "adapter's folder (default: the adapter's `weights` in the config)")
    parser.add_argument('--adapter', help='its name in the config; required if there are several')
    parser.add_argument('--format', choices=('diffusers', 'peft', 'kohya', 'original'),
                        help="default: that of the adapter's own ecosystem")
    parser.add_argument('--dtype', choices=('float16', 'bfloat16', 'float32'),
                        help='dtype of the written weights (default: unchanged)')
    _add_overrides(parser, 'model.pretrained=BASE')


def _days(text: str) -> float:
    try:
        if 0 <= (days := float(text)) < float('inf'):
            return days
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' must be a number of days of at least 0")


def _cache(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('--folder', help='folder of the cache (default: the key `cache` of the config)')
    parser.add_argument('--num-samples', type=int, help='fill only the first samples of each epoch that is filled')
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument('--verify', action='store_true',
                         help='compute what this config reads and compare it with the entries; remove wrong ones')
    instead.add_argument('--prune', type=_days, metavar='DAYS',
                         help='remove what no run has used for so many days; nothing is encoded')
    instead.add_argument('--show', action='store_true', help='say what the cache holds; nothing is encoded')
    _add_overrides(parser, 'resolution=512')
    _add_launcher(parser)


def _data(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_overrides(parser, 'train_dataloader.dataset.source=DATA')


def _plan(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument('--device', help="the device to plan for: its name (H100, A100, RTX4090, ...); default: this "
                                         "machine's, whose rates are measured in two seconds")
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the figures to a file')
    _add_overrides(parser, 'resolution=512')


def _write_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', type=Path, help='folder to write; what this command wrote there before is replaced')
    parser.add_argument('--format', choices=('imagefolder', 'parquet'), default='imagefolder',
                        help='files and metadata.jsonl, or one data.parquet, which is faster for many rows')
    parser.add_argument('--length', type=int, default=50000, help='number of rows (default: 50000)')
    parser.add_argument('--split', default='train', help='which sequence of scenes: train, test, or any other name')
    parser.add_argument('--seed', type=int, default=0, help='seed of the scenes')
    parser.add_argument('--size', type=int, default=64, help='side of the images, in pixels (default: 64)')
    parser.add_argument('--conditioning', choices=('outline', 'edge', 'mask', 'depth', 'none'), default='outline',
                        help='what the conditioning images show (default: outline)')
    parser.add_argument('--styles', nargs='+', default=argparse.SUPPRESS, metavar='STYLE',
                        help='of flat, outlined, striped, glossy, dotted, ringed (default: the first four)')
    parser.add_argument('--combinations', choices=('seen', 'held_out', 'all'), default='seen',
                        help='pairs of fill and shape: seen by the shipped base in training, held out, or all')
    parser.add_argument('--reference', action='store_true', help='also another image in the same colours')


def _list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('words', nargs='*', help='show only configs whose name or description has each of these words')


COMMANDS = {
    'train': Command('Train what a config describes.', _train),
    'test': Command('Evaluate trained weights on the test data of a config.', _test),
    'report': Command('Write report.html of a training or a test: curves, metrics, images, config.', _report,
                      takes_config=False),
    'infer': Command('Make images with a config, or make a PNG again that was made here.', _infer),
    'export': Command('Export one adapter for other tools, load it again, and compare.', _export),
    'card': Command("Write an export's model card again, with a test's results.", _card, takes_config=False),
    'plan': Command('Say what a training will need: memory, time, and a batch and checkpointing that fit.', _plan),
    'data': Command('Report on the training data of a config: captions, sizes, duplicates, buckets.', _data),
    'cache': Command('Fill the cache of a config ahead of its training; show, verify or prune it.', _cache),
    'list': Command('List the installed configs.', _list, takes_config=False),
    'write-shapes': Command('Write the shapes data set in the form of fusing/fill50k, for HFDataset.', _write_shapes,
                            takes_config=False)}


#: Other words for commands.
ALIASES = {'generate': 'infer', 'sample': 'infer', 'inference': 'infer', 'run': 'infer', 'evaluate': 'test',
           'eval': 'test', 'finetune': 'train', 'fit': 'train', 'convert': 'export', 'configs': 'list', 'ls': 'list',
           'estimate': 'plan', 'dry-run': 'plan', 'compare': 'test', 'readme': 'card', 'model-card': 'card'}


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 1 for an error, 2 for wrong options, 130 for Ctrl-C.

    Args:
        command: a key of COMMANDS; None takes it from the command line.
        arguments: of the command line; None: those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    program = None
    if command is None:
        command, *arguments = arguments or ['--help']
        if command in ('-h', '--help', '--version'):
            print(__version__ if command == '--version' else overview())
            return 0
        if command not in COMMANDS:
            near = did_you_mean(command, list(COMMANDS))
            if command in ALIASES:
                near = f" Did you mean '{ALIASES[command]}'?"
            print(f"error: unknown command '{command}'.{near} '{PROGRAM} -h' lists them.", file=sys.stderr)
            return 2
        program = f'{PROGRAM} {command}'
    return _run(command, parse(command, arguments, program))


def parse(command: str, arguments: Sequence[str], program: str | None = None) -> argparse.Namespace:
    """Return the options of a command line.

    Raises:
        SystemExit: they are wrong, or ask for help.
    """
    parser = Parser(command, COMMANDS[command].description, prog=program)
    COMMANDS[command].add_options(parser)
    args = parser.parse(arguments)
    if command == 'test':
        args.checkpoint = args.checkpoint or args.checkpoint_option
        if args.checkpoint is None:
            parser.error('name the weights: --checkpoint W, where W is a work dir, a step<N>.pth, an export, or none.')
    if command == 'write-shapes':
        args.conditioning = None if args.conditioning == 'none' else args.conditioning
    return args


def _run(command: str, args: argparse.Namespace) -> int:
    if COMMANDS[command].takes_config and not args.config.lower().endswith('.png'):
        try:  # before torch is imported
            config_files.find(args.config)
            if command in ('train', 'test') and args.work_dir is not None:
                _check_work_dir(Path(args.work_dir))
        except UserError as error:
            errors.report(str(error))
            return 1
    if hasattr(args, 'local_rank'):
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return errors.run_command('list_configs' if command == 'list' else command.replace('-', '_'), args)


def _check_work_dir(path: Path) -> None:
    """Check that `path` is a folder or can be made one.

    Raises:
        UserError: it is a file, or would lie in one.
    """
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
        raise UserError(f"--work-dir {path}: '{file}' is a file; name a folder, which need not exist.")


def overview() -> str:
    """Return the help of `diffengine-sdxl` itself."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:<{width}}  {command.description}' for name, command in COMMANDS.items()]
    return '\n'.join([f'usage: {PROGRAM} COMMAND [options]', '', 'An experiment engine for SDXL adapters.', '', *lines,
                      '', f"'{PROGRAM} COMMAND -h' lists the options of a command."])
