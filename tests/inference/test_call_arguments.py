"""What a call in Python takes besides a request: generators, lists of prompts; and scales of guidances, everywhere."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import BASE, PROMPT, SIZE, TO_IMAGE, Here, Refined, asked, by_hand, config, picture, pictures
from parity import SOLVERS, generators, stock_like
from torch import Tensor

from diffengine_sdxl.commands.infer.untrusted import read_png
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.call_arguments import seeds_of, split_prompts
from diffengine_sdxl.inference.inferencer import SDXLInferencer

Guided = Callable[..., SDXLInferencer]
SEED = 5


def fresh(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(ours: SDXLInferencer, **call: Any) -> Tensor:
    images: Tensor = ours(**{**dict(prompt=PROMPT, output_type='pt'), **SIZE, **call})
    return images


def test_generators_are_stocks(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """One, several, with noise in every step; a fresh one without a seed has torch's own; they stay as they were."""
    own = torch.Generator()
    for given in (fresh(), [fresh()], (fresh(),), own):
        before = [g.get_state() for g in (given if isinstance(given, list | tuple) else [given])]
        got = made(inferencer, generator=given)
        again = made(inferencer, generator=given)  # not used up
        expected = pipelines[BASE](PROMPT, num_inference_steps=3, generator=own if given is own else fresh(),
                                   output_type='pt', **SIZE).images
        assert torch.equal(got, expected) and torch.equal(again, expected)
        if given is not own:  # stock used it
            assert all(torch.equal(g.get_state(), state) for g, state in zip(
                given if isinstance(given, list | tuple) else [given], before, strict=True))
    assert torch.equal(made(inferencer, generator=fresh(), image=picture(), strength=0.7, num_inference_steps=4),
                       asked(pipelines[TO_IMAGE], SEED, 4, prompt=PROMPT, image=picture().resize((64, 48), 1),
                             strength=0.7))


def test_a_generator_for_each_image(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """Of several prompts, and of several images of one: as stock's, one by one; not as `seed`, which counts up."""
    seeds = [7, 1, 9, 7]
    expected = torch.cat([asked(pipelines[BASE], seed, prompt=prompt, **SIZE)
                          for seed, prompt in zip(seeds, ['a cat', 'a cat', 'a dog', 'a dog'], strict=True)])
    assert torch.equal(made(inferencer, prompt=['a cat', 'a dog'], num_images_per_prompt=2,
                            generator=generators(seeds)), expected)
    assert torch.equal(made(inferencer, prompt=['a cat', 'a dog'], generator=generators([7, 9])), expected[::2])


@pytest.mark.parametrize(('given', 'call', 'sentence'), [
    ('x', {}, "generator='x' must be a torch.Generator, or a list of them"), (5, {}, 'generator=5 must be a'),
    ([fresh(), 5], {}, 'generator=5 must be a torch.Generator'), ([[fresh()]], {}, 'must be a torch.Generator, or a'),
    (fresh(), dict(seed=0), 'Give seed or generator, not both'), ([fresh()], dict(seed=3), 'Give seed or generator'),
    (fresh(-1), {}, r"seed, 18446744073709551615, is too large; seeds end below 2 \*\* 63"),
    ([fresh(-1)], {}, 'is too large'), ([], {}, r'There are 0 generator\(s\) for 1 images; give one per image'),
    ([fresh(1), fresh(2)], {}, 'There are 2 .* for 1 images'),
    # Stock would go on with it, so that the second image had no seed of its own.
    (fresh(), dict(num_images_per_prompt=2), 'There are 1 .* for 2 images'),
    (fresh(), dict(prompt=['a', 'b']), 'There are 1 .* for 2 images')])
def test_generators_that_are_refused(inferencer: SDXLInferencer, given: Any, call: dict[str, Any],
                                     sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        made(inferencer, generator=given, **call)


@pytest.mark.parametrize('as_list', [False, True])
def test_a_used_generator_is_refused(inferencer: SDXLInferencer, as_list: bool) -> None:
    """With the seed to make a fresh one of; the largest seed is taken."""
    used = fresh(12)
    torch.rand(1, generator=used)
    with pytest.raises(UserError, match=r'used already, .*torch.Generator\(\).manual_seed\(12\)'):
        made(inferencer, generator=[used] if as_list else used)
    assert seeds_of(fresh(2 ** 63 - 1), {}) == [2 ** 63 - 1] and seeds_of(None, {'seed': 3}) is None


def test_settings_by_prompt() -> None:
    """A list has one for each prompt, also of pairs and of custom steps; a pair or a dict is for all."""
    noise, image = torch.arange(4.0).view(4, 1, 1, 1), object()
    assert split_prompts(dict(prompt='a', seed=[1])) == [dict(prompt='a', seed=[1])] and split_prompts({}) == [{}]
    two = split_prompts(dict(
        prompt=('a', 'b'), seed=[1, 2], negative_prompt='n', target_size=(8, 16), original_size=[(1, 2), (3, 4)],
        sigmas=[2.0, 0.0], timesteps=[[9, 3], [8]], scales=dict(x=0.5), image=[image, 'j'], conditions=dict(
            x=['c', 'd'], y='e'), refiner=[dict(seed=1), dict(seed=2)], height=[8, None], latents=noise))
    assert [{k: v for k, v in one.items() if k != 'latents'} for one in two] == [
        dict(prompt='a', seed=1, negative_prompt='n', target_size=(8, 16), original_size=(1, 2), sigmas=[2.0, 0.0],
             timesteps=[9, 3], scales=dict(x=0.5), image=image, conditions=dict(x='c', y='e'), refiner=dict(seed=1),
             height=8),
        dict(prompt='b', seed=2, negative_prompt='n', target_size=(8, 16), original_size=(3, 4), sigmas=[2.0, 0.0],
             timesteps=[8], scales=dict(x=0.5), image='j', conditions=dict(x='d', y='e'), refiner=dict(seed=2))]
    # Two images for each of two prompts.
    assert [one['latents'].flatten().tolist() for one in two] == [[0, 1], [2, 3]]
    assert [one['image'] for one in split_prompts(dict(prompt=['a', 'b'], image=['i', 'j', 'k', 'l']))] == [
        ['i', 'j'], ['k', 'l']]


@pytest.mark.parametrize(('call', 'sentence'), [
    (dict(prompt=[]), r'prompt=\[\] holds no prompt'), (dict(prompt=3), 'prompt=3 must be a text, or a list of texts'),
    (dict(prompt=['a', 'b'], seed=[1, 2, 3]), "2 prompts and 3 of 'seed'; give one per prompt"),
    (dict(prompt=['a', 'b'], original_size=[(1, 2)]), "2 prompts and 1 of 'original_size'"),
    (dict(prompt=['a', 'b'], image=['i', 'j', 'k']), "2 prompts and 3 of 'image'"),
    (dict(prompt=['a', 'b'], conditions=dict(x=['c'])), "2 prompts and 1 of 'an adapter'")])
def test_lists_of_another_length(call: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        split_prompts(call)


@pytest.fixture(scope='module')
def guided(tiny_base: Path) -> Guided:
    """Return an inferencer with guidances in its config."""
    def guided(*guidances: dict[str, Any]) -> SDXLInferencer:
        cfg = config(tiny_base)
        cfg.model.sampler.guidances = list(guidances)
        return SDXLInferencer(cfg, device='cpu')
    return guided


CFG, LAYERS = dict(type='CFG', scale=5.0), ['down_blocks.1', 'up_blocks.0.attentions.0']
SCALES = [(dict(pag_scale=2.0), [dict(type='PAG', scale=2.0)]), (dict(sag_scale=0.6), [dict(type='SAG', scale=0.6)]),
          (dict(pag_scale=2.0, sag_scale=0.6, guidance_rescale=0.4), [
              dict(type='SAG', scale=0.6), dict(type='Rescale', scale=0.4), dict(type='PAG', scale=2.0)])]


@pytest.mark.parametrize(('call', 'guidances'), SCALES)
def test_scales_of_guidances(call: dict[str, Any], guidances: list[dict[str, Any]], guided: Guided,
                             inferencer: SDXLInferencer) -> None:
    """Bitwise a config with them; 0 switches off, and costs nothing; both for one call only."""
    ours = guided(*guidances, CFG)
    rows: list[int] = []
    ours.model.unet.register_forward_hook(lambda _, inputs, outputs: rows.append(len(outputs[0])))
    plain = made(inferencer, seed=SEED)
    expected = made(ours, seed=SEED)
    assert torch.equal(made(inferencer, seed=SEED, **call), expected) and (expected - plain).abs().max() > 1e-4
    rows.clear()
    off = made(ours, seed=SEED, **dict.fromkeys(call, 0))
    assert rows == [2, 2, 2]
    assert torch.equal(off, plain) and torch.equal(made(inferencer, seed=SEED, **dict.fromkeys(call, 0)), plain)
    assert torch.equal(made(inferencer, seed=SEED), plain) and torch.equal(made(ours, seed=SEED), expected)


def test_pag_is_stocks(inferencer: SDXLInferencer, guided: Guided, pipelines: dict[str, Any]) -> None:
    """pag_scale as diffusers' pipeline takes it, without CFG too; the layers of a config stay."""
    ours = guided(dict(type='PAG', layers=LAYERS, scale=9.0), CFG)
    images = []
    for asker, layers, cfg in ((inferencer, 'mid', 5.0), (inferencer, 'mid', 1.0), (ours, LAYERS, 5.0)):
        pipe = stock_like(pipelines[BASE], 'StableDiffusionXLPAGPipeline', SOLVERS['ancestral'],
                          pag_applied_layers=layers)
        before = pipe.unet.attn_processors
        expected = asked(pipe, prompt=PROMPT, pag_scale=2.0, guidance_scale=cfg, **SIZE)
        pipe.unet.set_attn_processor(before)
        images.append(made(asker, seed=SEED, pag_scale=2.0, guidance_scale=cfg))
        assert torch.equal(images[-1], expected)
    assert all((images[-1] - other).abs().max() > 1e-4 for other in images[:-1])


def test_scales_of_the_refiner(refined: Refined) -> None:
    """Its own: nothing is taken from the base's; the same as in the config of its sampler."""
    def of(ours: SDXLInferencer, pag: float | None = None, **refiner: Any) -> Tensor:
        return made(ours, seed=SEED, num_inference_steps=2, pag_scale=pag, refiner=dict(strength=0.7, **refiner))
    cfg = refined.ours.cfg.copy()
    cfg.refiner.sampler = {**cfg.model.sampler, 'guidances': [
        dict(type='PAG', scale=2.0), dict(type='SAG', scale=0.5), CFG]}
    plain, of_base = of(refined.ours), of(refined.ours, 2.0)
    of_refiner = of(refined.ours, pag_scale=2.0, sag_scale=0.5)
    in_config = SDXLInferencer(cfg, device='cpu')
    assert torch.equal(of_refiner, of(in_config))
    assert len({image.numpy().tobytes() for image in (plain, of_base, of_refiner)}) == 3
    assert torch.equal(of(in_config, 0, pag_scale=0, sag_scale=0), plain)


@pytest.mark.parametrize(('call', 'sentence'), [
    (dict(pag_scale='2'), "pag_scale='2' must be a number"), (dict(sag_scale=[1.0]), r'sag_scale=\[1.0\] must be a'),
    (dict(guidance_rescale=2), 'Rescale: scale=2.0 must be from 0'),
    (dict(refiner=dict(pag_scale='x')), "refiner: pag_scale='x' must be a number")])
def test_scales_that_are_refused(inferencer: SDXLInferencer, call: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        made(inferencer, **call)


def test_scales_of_the_command(here: Here) -> None:
    """Options, --set and a table's columns; recorded in the PNG, from which the image is made again."""
    path = here.config()
    here.infer(path, '--pag-scale', 2, '--sag_scale=0.5', '--out', 'A')
    here.infer(path, '--set', 'pag_scale=2', 'sag_scale=0.5', '--out', 'B')
    with open('rows.csv', 'w', newline='') as file:
        csv.writer(file).writerows([['prompt', 'pag_scale', 'sag_scale'], ['a frog', '2', '0.5'], ['a frog', '', '']])
    here.infer(path, '--prompts', 'rows.csv', '--out', 'C')
    guided, plain = by_hand(path, dict(pag_scale=2, sag_scale=0.5), {})
    assert guided != plain and list(pictures('C').values()) == [guided, plain]
    assert list(pictures('A').values()) == list(pictures('B').values()) == [guided]
    image, = Path('A').glob('0*.png')
    recorded = read_png(image)['request']
    assert (recorded['pag_scale'], recorded['sag_scale']) == (2.0, 0.5)
    here.infer(image, '--out', 'again')
    assert list(pictures('again').values()) == [guided]
