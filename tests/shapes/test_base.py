"""The shipped base: it loads wherever SDXL loads, matches its manifest, and draws what prompts say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import generators, picture_batch, sampler, stock

from diffengine_sdxl.datasets import Shapes, collate
from diffengine_sdxl.loading.strict import shipped
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.shapes import BASE
from diffengine_sdxl.shapes.measure import observe

NAME = 'diffengine_sdxl::shapes/base'
TRANSFORMS = [{'type': 'ComputeTimeIds'}, {'type': 'PackInputs'}]


@pytest.fixture(scope='module')
def model() -> SDXL:
    """The shipped base, as the configs name it."""
    return SDXL(NAME).eval()


def test_it_is_a_diffusers_folder_of_half_precision_below_20_mb() -> None:
    from safetensors import safe_open
    assert shipped(NAME) == str(BASE)
    files = [p for p in BASE.rglob('*') if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 20e6
    weights = [p for p in files if p.suffix == '.safetensors']
    assert {p.parent.name for p in weights} == {'unet', 'vae', 'text_encoder', 'text_encoder_2', 'image_encoder'}
    for path in weights:
        with safe_open(path, 'pt') as tensors:
            names = tensors.keys()
            assert {str(tensors.get_slice(name).get_dtype()) for name in names} <= {'F16', 'I64'}, path


def test_no_json_holds_a_path_of_the_machine() -> None:
    """diffusers records where it loaded weights from as `_name_or_path`."""
    assert [path for path in BASE.rglob('*.json') if re.search(r'_name_or_path|"/\w+/', path.read_text())] == []


def test_the_manifest_tells_how_it_was_trained() -> None:
    manifest = json.loads((BASE / 'manifest.json').read_text())
    runs = manifest['runs']
    assert manifest['machine'] and manifest['put_together_at'] and set(runs) >= {'vae', 'unet', 'image_encoder'}
    for run in runs.values():
        assert run['step'] > 0 and run['seconds'] > 0 and run['versions']['torch']
        assert run['config']['train_dataloader']['dataset'] and run['seed'] is not None


def test_diffusers_makes_the_same_images(model: SDXL) -> None:
    """Bitwise, by the pipeline that `DiffusionPipeline.from_pretrained` builds."""
    pipeline = stock(BASE, 'DiffusionPipeline')
    assert type(pipeline).__name__ == 'StableDiffusionXLPipeline'
    prompts = ['a striped cyan circle on brown', 'a red triangle on white']
    theirs = pipeline(prompts, num_inference_steps=3, guidance_scale=1.5, height=64, width=64, output_type='pt',
                      generator=generators([1, 2])).images
    model.sampler = sampler(steps=3, scale=1.5)
    ours = model.decode(model.sampler(model, picture_batch(prompts, [1, 2])))
    assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize(('combinations', 'least'), [('seen', 0.75), ('held_out', 0.6)])
def test_it_draws_its_prompts(model: SDXL, combinations: str, least: float) -> None:
    """24 captions that were never trained on; a smoke test, benchmarks/shapes.py has the full measurement."""
    data = Shapes(length=24, split='test', combinations=combinations, conditioning=None)
    scenes = [data.scene(i) for i in range(len(data))]
    model.sampler = sampler(steps=12, scale=1.5)
    images = model.decode(model.sampler(model, picture_batch([s.caption for s in scenes], list(range(24)))))
    seen = [observe((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in images]
    for what in ('shape', 'fill', 'ground'):
        right = sum(getattr(s, what) == getattr(o, what) for s, o in zip(scenes, seen, strict=True)) / 24
        assert right >= least, (what, right)


def test_the_vae_keeps_images_it_never_saw(model: SDXL) -> None:
    data = Shapes(length=24, split='psnr', combinations='all', conditioning=None, transforms=TRANSFORMS)
    batch = model.data_preprocessor(collate([data[i] for i in range(24)]))['inputs']
    with torch.no_grad():
        decoded = model.decode(model.posterior(batch).mean * model.vae.config.scaling_factor)
    error = (decoded - (batch.img * 0.5 + 0.5)).square().mean(dim=(1, 2, 3))
    assert float(-10 * torch.log10(error).mean()) > 29


def test_its_latents_have_a_deviation_of_one(model: SDXL) -> None:
    data = Shapes(length=64, split='scale', conditioning=None, transforms=TRANSFORMS)
    with torch.no_grad():
        latents = model.latents(model.data_preprocessor(collate([data[i] for i in range(64)]))['inputs'])
    assert float(latents.std()) == pytest.approx(1, abs=0.05)


def test_its_image_encoder_knows_captions_from_images(model: SDXL) -> None:
    """The own caption of an image is the nearest of 16 for most."""
    from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection
    encoder = CLIPVisionModelWithProjection.from_pretrained(BASE, subfolder='image_encoder').eval()
    processor = CLIPImageProcessorPil.from_pretrained(BASE, subfolder='feature_extractor')
    data = Shapes(length=16, split='test', conditioning=None, transforms=[])
    samples: list[dict[str, Any]] = [data[i] for i in range(16)]
    with torch.no_grad():
        images = encoder(processor([s['img'] for s in samples], return_tensors='pt').pixel_values).image_embeds
        text = model.encode(picture_batch([s['text'] for s in samples], [0] * 16)).pooled
    similar = torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    assert float((similar.argmax(dim=1) == torch.arange(16)).float().mean()) >= 0.75


def test_other_folders_of_the_package_are_refused() -> None:
    for name in ('diffengine_sdxl::shapes/nothing', 'diffengine_sdxl::../tests', 'diffengine_sdxl::'):
        with pytest.raises(ValueError, match='this package has no folder'):
            shipped(name)
    assert shipped('some/folder') == 'some/folder' and shipped(None) is None
    assert Path(str(shipped(NAME))).is_dir()
