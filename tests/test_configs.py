"""Configs are short and say what they are; the T2I-Adapter ones share all but a few keys, and their transforms run."""

import json
import re
import statistics
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffengine_sdxl import config
from diffengine_sdxl.config.references import differences
from diffengine_sdxl.config_files import description, installed_configs
from diffengine_sdxl.datasets import HFDataset
from diffengine_sdxl.registry import DATASETS

ROOT = Path(__file__).resolve().parents[1]
FILL50K = 'stable_diffusion_xl_t2i_adapter_fill50k'
VARIANTS = ('canny', 'depth', 'sketch', 'lineart', 'pose')
DETECTORS = {'sketch': 'PidiNetDetector', 'lineart': 'LineartDetector', 'pose': 'OpenposeDetector'}


def name_of(variant: str) -> str:
    return f'stable_diffusion_xl_t2i_adapter_{variant}'


def changed(one: str, other: str) -> set[str]:
    """Return the dotted keys in which two configs differ, with references unresolved."""
    lines = differences(*(config.to_plain(config.load(name)) for name in (one, other)))
    return {line.partition(' was ')[0] for line in lines}


def test_a_base_name_names_one_config() -> None:
    counts = Counter(p.name for p in (ROOT / 'configs').rglob('*.py'))
    leaves = [p.name for p in installed_configs()]
    assert not [name for name in leaves if counts[name] > 1]


def test_a_config_says_in_one_line_what_it_is() -> None:
    lines = {p.stem: description(p) for p in installed_configs()}
    assert not {name: line for name, line in lines.items() if not line.endswith('.')}
    assert not [line for line, count in Counter(lines.values()).items() if count > 1]


def test_leaves_are_short() -> None:
    """A recipe, a data set, and what differs."""
    lengths = [len(p.read_text().splitlines()) for p in installed_configs()
               if p.parent.name not in ('infer', 'shapes', 'tiny')]
    assert statistics.mean(lengths) <= 5


def test_every_piece_is_used() -> None:
    """By a name of `_base_` that leads to it."""
    used = {(path.parent / base).resolve() for path in (ROOT / 'configs').rglob('*.py')
            for base in re.findall(r"'([^']+\.py)'", path.read_text())}
    assert set((ROOT / 'configs' / '_base_').rglob('*.py')) <= used


def test_a_config_of_ones_own_is_a_recipe_and_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / 'own.py'
    path.write_text("_base_ = ['diffengine_sdxl::_base_/recipes/lora.py',\n"
                    "          'diffengine_sdxl::_base_/datasets/captions.py']\n")
    assert changed(str(path), 'stable_diffusion_xl_lora_text_to_image') == set()


def test_variants_share_all_but_a_few_keys() -> None:
    data = 'train_dataloader.dataset'
    assert {key for key in changed(FILL50K, name_of('canny')) if not key.startswith('test_evaluator')} == {
        f'{data}.source', f'{data}.conditioning_image_column', f'{data}.transforms', 'condition'}
    for variant in VARIANTS[1:]:
        assert {key.partition('.')[0] for key in changed(name_of('canny'), name_of(variant))} == {
            'condition', 'test_evaluator'}


def test_a_test_measures_what_is_trained() -> None:
    """Every recipe has metrics; they read the training's data, also if an override names another, and its extractor."""
    for name in ('controlnet_fill50k', 'ip_adapter', 'lora_text_to_image', 'lora_dreambooth', 'textual_inversion'):
        cfg = config.resolve(config.load(f'stable_diffusion_xl_{name}'))
        data = cfg.train_dataloader.dataset
        assert cfg.test_dataloader.dataset == data.get('instance', data) and cfg.test_evaluator, name
    options = ['condition.model=MODEL', 'train_dataloader.dataset.source=DATA']
    cfg = config.resolve(config.load(name_of('depth'), options))
    assert cfg.test_evaluator[0].extractor.model == 'MODEL' and cfg.test_dataloader.dataset.source == 'DATA'


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_variant_is_a_few_lines(variant: str) -> None:
    text = (ROOT / 'configs' / 't2i_adapter' / f'{name_of(variant)}.py').read_text()
    assert len(text.splitlines()) <= 10


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of two captioned images without conditions."""
    folder = tmp_path_factory.mktemp('captioned')
    rows = []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
        rows.append(json.dumps({'file_name': f'{i}.png', 'text': f'image {i}'}))
    (folder / 'metadata.jsonl').write_text('\n'.join(rows) + '\n')
    return folder


@pytest.fixture(scope='module')
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil
    folder = tmp_path_factory.mktemp('depth')
    DPTForDepthEstimation(DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5], is_hybrid=False)).save_pretrained(folder)
    DPTImageProcessorPil(size={'height': 32, 'width': 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the optional package controlnet_aux by its detectors' signatures; return the list of their calls."""
    calls: list[dict[str, Any]] = []

    class Detector:
        @classmethod
        def from_pretrained(cls, pretrained_model_or_path: str, filename: str | None = None,
                            cache_dir: str | None = None) -> 'Detector':
            calls.append({'weights': pretrained_model_or_path})
            return cls()

        def to(self, device: str) -> 'Detector':
            return self

        def run(self, image: Image.Image, **options: Any) -> Image.Image:
            calls.append({'class': type(self).__name__, **options})
            side = options['image_resolution']
            return Image.new('RGB', (side, side), (255, 255, 255))

    class PidiNetDetector(Detector):
        def __call__(self, input_image: Any, detect_resolution: int = 512, image_resolution: int = 512,
                     safe: bool = False, return_pil: Any = None, scribble: bool = False, apply_filter: bool = False,
                     output_type: str = 'pil') -> Any:
            return self.run(input_image, detect_resolution=detect_resolution, image_resolution=image_resolution)

    class LineartDetector(Detector):
        def __call__(self, input_image: Any, coarse: bool = False, detect_resolution: int = 512,
                     image_resolution: int = 512, return_pil: Any = None, output_type: str = 'pil') -> Any:
            return self.run(input_image, detect_resolution=detect_resolution, image_resolution=image_resolution)

    class OpenposeDetector(Detector):
        def __call__(self, input_image: Any, detect_resolution: int = 512, image_resolution: int = 512,
                     include_body: bool = True, include_hand: bool = False, include_face: bool = False,
                     hand_and_face: Any = None, return_pil: Any = None, output_type: str = 'pil') -> Any:
            return self.run(input_image, detect_resolution=detect_resolution, image_resolution=image_resolution)

    module = types.ModuleType('controlnet_aux')
    for cls in (PidiNetDetector, LineartDetector, OpenposeDetector):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, 'controlnet_aux', module)
    return calls


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_transforms_of_a_variant_produce_a_sample(variant: str, image_folder: Path, depth_model: Path,
                                                   detectors: list[dict[str, Any]]) -> None:
    options = ['resolution=64', f'train_dataloader.dataset.source={image_folder}']
    if variant == 'depth':
        options.append(f'condition.model={depth_model}')
    cfg = config.resolve(config.load(name_of(variant), options))
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset))
    assert isinstance(dataset, HFDataset)
    sample = dataset[1]
    condition = sample['conditioning_image']
    assert condition.shape == sample['img'].shape == (3, 64, 64) and sample['text'] == 'image 1'
    assert condition.dtype == torch.uint8 and condition.max() == 255
    assert sample['time_ids'].tolist() == [80, 96, 0, 6, 64, 64]
    if variant in DETECTORS:
        assert detectors[0] == {'weights': 'lllyasviel/Annotators'}
        assert detectors[1]['class'] == DETECTORS[variant] and detectors[1]['image_resolution'] == 64
    if variant == 'canny':
        import cv2
        assert np.array_equal(condition[0].numpy(), cv2.Canny(sample['img'].permute(1, 2, 0).numpy(), 100, 200))


@pytest.mark.parametrize('variant', DETECTORS)
def test_a_missing_package_is_named(variant: str, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'controlnet_aux', None)
    options = ['resolution=64', f'train_dataloader.dataset.source={image_folder}']
    cfg = config.resolve(config.load(name_of(variant), options))
    with pytest.raises(ValueError, match='controlnet_aux'):
        DATASETS.build(dict(cfg.train_dataloader.dataset))[0]
