"""Write model-index.yml, which `mim search` and `mim download` read, from the configs."""

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Folder of configs -> name of its collection (what `mim search --model` takes), and the paper, if there is one.
COLLECTIONS = {
    'controlnet': ('ControlNet', 'https://arxiv.org/abs/2302.05543'),
    'infer': ('Inference', 'https://arxiv.org/abs/2307.01952'),
    'ip_adapter': ('IP-Adapter', 'https://arxiv.org/abs/2308.06721'),
    'joint': ('Joint', None),
    'lora': ('LoRA', 'https://arxiv.org/abs/2106.09685'),
    'shapes': ('Shapes', None),
    't2i_adapter': ('T2I-Adapter', 'https://arxiv.org/abs/2302.08453'),
    'textual_inversion': ('Textual-Inversion', 'https://arxiv.org/abs/2208.01618'),
    'tiny': ('Tiny', None),
}
#: `mim download` ends in a traceback if an entry has no weights. It skips what the destination has already, by the name
#: after the last slash; the empty name is the destination itself, so it writes the config and fetches nothing.
NO_WEIGHTS = 'none published/'
HEADER = '# Written by `python tools/make_model_index.py`.\n'


def training_data(config: Any) -> list[str]:
    """Return the sources that a resolved config trains on, or the type of a data set that has none."""
    dataset = (config.get('train_dataloader') or {}).get('dataset', {})
    parts = [dataset[name] for name in ('instance', 'prior') if name in dataset] or [dataset]
    return [part.get('source') or part['type'] for part in parts if part]


def entry(path: Path) -> dict[str, Any]:
    """Return the entry of the config at `path`.

    `mim search` shows and filters by the metadata: `Task` lists the commands that the config is for, `Architecture` the
    types of its adapters.
    """
    from diffengine_sdxl import config
    from diffengine_sdxl.config_files import configs_folder, description
    resolved = config.resolve(config.read(path))
    model = resolved.model
    tasks = {'train': bool(resolved.get('train_cfg')),
             'test': 'test_dataloader' in resolved, 'infer': 'sampler' in model}
    metadata = {
        'Description': description(path),
        'Task': [task for task, there in tasks.items() if there],
        'Architecture': sorted({adapter['type'] for adapter in model.get('adapters', {}).values() if adapter}),
        'Training Data': training_data(resolved),
        'Iterations': (resolved.get('train_cfg') or {}).get('max_iters'),
    }
    return {
        'Name': path.stem,
        'In Collection': COLLECTIONS[path.parent.name][0],
        'Config': path.relative_to(configs_folder().parent).as_posix(),
        'Weights': NO_WEIGHTS,
        'Metadata': {key: value for key, value in metadata.items() if value},
    }


def model_index() -> str:
    """Return the text of model-index.yml for the installed configs."""
    import yaml

    from diffengine_sdxl.config_files import installed_configs
    collections = [{'Name': name, **({'Paper': paper} if paper else {})} for name, paper in COLLECTIONS.values()]
    index = {'Collections': collections, 'Models': [entry(path) for path in installed_configs()]}
    return HEADER + yaml.safe_dump(index, sort_keys=False, default_flow_style=None, width=120)


def main() -> int:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    (ROOT / 'model-index.yml').write_text(model_index(), encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
