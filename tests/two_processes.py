"""Run the cases of test_distributed.py in each of two processes: `two_processes.py FOLDER`, with FOLDER/cases.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from runs import build, first_gradients

from diffengine_sdxl.commands import launch


def main() -> None:
    torch.set_num_threads(1)
    launch.start_processes('pytorch')
    folder = Path(sys.argv[-1])  # before it stands --local-rank=N
    for name, case in json.loads((folder / 'cases.json').read_text()).items():
        runner = build(Path(case['work_dir']), {**case['options'], 'launcher': 'pytorch'}, case['resume'])
        if case.get('tests'):
            runner.test()
            continue
        gradients = first_gradients(runner)
        torch.save(gradients, folder / f'{name}.{torch.distributed.get_rank()}.pt')


if __name__ == '__main__':
    main()
