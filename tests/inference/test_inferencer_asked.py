"""SDXLInferencer with inputs per image, crops and clip_skip; and that inputs are encoded and fetched once."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import BASE, INPAINT, PROMPT, SIZE, TO_IMAGE, Refined, asked, config, mask, picture
from kinds import CASES, build, shaken
from parity import generators
from PIL import Image
from safetensors.torch import save_file

from diffengine_sdxl.datasets import image_files as images
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.inference.inferencer import SDXLInferencer
from diffengine_sdxl.models.prompt_branches import MAX_CACHED_ROWS, embed

NOISES = torch.randn((3, 4, 6, 8), generator=torch.Generator().manual_seed(4))


def test_noise_of_each_picture(inferencer: SDXLInferencer, pipelines: dict[str, Any], tmp_path: Path) -> None:
    """Picture k takes row k, of a tensor, a list or a file, as stock's does within the rounding of a batch; of several
    prompts each its part of them."""
    call: dict[str, Any] = dict(seed=5, output_type='pt', **SIZE)
    alone = torch.cat([inferencer(PROMPT, **{**call, 'seed': 5 + k}, latents=NOISES[k]) for k in range(3)])
    save_file({'x': NOISES}, tmp_path / 'n.safetensors')
    for given in (NOISES, list(NOISES), tmp_path / 'n.safetensors', str(tmp_path / 'n.safetensors')):
        assert torch.equal(inferencer(PROMPT, latents=given, num_images_per_prompt=3, **call), alone)
    row = inferencer(PROMPT, latents=str(tmp_path / 'n.safetensors'), latents_row=1, **{**call, 'seed': 6})
    assert torch.equal(row, alone[1:2])
    pipeline = pipelines[BASE]
    stocks = pipeline(PROMPT, latents=NOISES, num_images_per_prompt=3, generator=generators([5, 6, 7]),
                      num_inference_steps=3, guidance_scale=5.0, output_type='pt', **SIZE).images
    torch.testing.assert_close(alone, stocks, rtol=0, atol=1e-5)
    both = inferencer(['a', 'b'], latents=torch.cat([NOISES, -NOISES]), num_images_per_prompt=3, **call)
    each = [inferencer(p, latents=n, num_images_per_prompt=3, **call) for p, n in (('a', NOISES), ('b', -NOISES))]
    assert torch.equal(both, torch.cat(each))
    assert torch.equal(inferencer(['a'], latents=NOISES, num_images_per_prompt=3, **call), each[0])


def test_an_image_for_each_picture(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """The refiner of the guides: `image=` several latents, or pictures as list, tensor or arrays; one is for all."""
    shown = [picture(k, (64, 48)) for k in range(3)]
    arrays = [np.array(p) for p in shown]
    pixels = torch.stack([torch.from_numpy(a).permute(2, 0, 1) / 255 for a in arrays])
    call: dict[str, Any] = dict(strength=0.7, output_type='pt')

    def alone(given: Any, **more: Any) -> torch.Tensor:
        return torch.cat([asked(pipelines[more.pop('task', TO_IMAGE)], 5 + k, prompt=PROMPT, image=one, **call, **{
            name: value[k] for name, value in more.items()}) for k, one in enumerate(given)])

    def ours(given: Any, num: int = 3, **more: Any) -> Any:
        return inferencer(PROMPT, image=given, seed=5, num_images_per_prompt=num, **call, **more)
    expected = alone(shown)
    assert all((expected[0] - other).abs().max() > 1e-3 for other in expected[1:])
    for given in (shown, tuple(shown), arrays, np.stack(arrays)):
        assert torch.equal(ours(given), expected)
    assert torch.equal(ours(pixels), alone(pixels[:, None]))
    assert torch.equal(ours(np.stack(arrays) / np.float32(255)), alone([a[None] / np.float32(255) for a in arrays]))
    assert torch.equal(ours(NOISES), alone(NOISES[:, None]))
    for one in (shown[0], shown[:1], arrays[0], arrays[0][None]):
        assert torch.equal(ours(one, 2), alone([shown[0]] * 2))
    assert torch.equal(ours(pixels[:1], 2), alone([pixels[:1]] * 2))


def test_a_mask_for_each_picture(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """As PIL, arrays of bytes or truths, tensors; one for all; over a picture of each."""
    shown = [picture(k, (64, 48)) for k in range(3)]
    call: dict[str, Any] = dict(strength=0.7, output_type='pt', **SIZE)

    def alone(masks: Any) -> torch.Tensor:
        return torch.cat([asked(pipelines[INPAINT], 5 + k, prompt=PROMPT, image=shown[k], mask_image=one, **call)
                          for k, one in enumerate(masks)])

    def ours(masks: Any) -> Any:
        return inferencer(PROMPT, image=shown, mask_image=masks, seed=5, num_images_per_prompt=3, **call)
    wheres = [mask(), mask().rotate(90), mask().rotate(180)]
    expected = alone(wheres)
    assert all((expected[0] - other).abs().max() > 1e-3 for other in expected[1:])
    for given in (wheres, [np.asarray(w) for w in wheres]):
        assert torch.equal(ours(given), expected)
    truths = np.stack([np.asarray(w.resize((64, 48))) >= 128 for w in wheres])
    floats = torch.from_numpy(truths).float()
    for more in (list(truths), truths[..., None], floats[:, None], list(floats), list(floats.numpy())):
        assert torch.equal(ours(more), alone(floats[:, None]))
    assert torch.equal(ours(wheres[0]), alone([wheres[0]] * 3))


def test_a_part_of_a_picture(inferencer: SDXLInferencer, pipelines: dict[str, Any], tmp_path: Path) -> None:
    """padding_mask_crop: cut out, repainted at the size asked for and put back, byte for byte as stock's."""
    image = picture(0, (120, 90))
    where = Image.new('L', image.size)
    where.paste(255, (70, 20, 90, 50))
    where.paste(90, (60, 30, 70, 40))
    image.save(tmp_path / 'i.png')
    found = []
    for pad, size in ((4, SIZE), (0, dict(height=64, width=64)), (400, SIZE)):
        call: dict[str, Any] = dict(prompt=PROMPT, mask_image=where, padding_mask_crop=pad, **size)
        got, = inferencer(image=image if pad else tmp_path / 'i.png', seed=5, **call)
        expected, = asked(pipelines[INPAINT], image=image, output_type='pil', **call)
        assert got.size == (120, 90) and got.tobytes() == expected.tobytes()
        found.append(got.tobytes())
    assert len(set(found)) == 3
    both = dict(image=image, mask_image=where, padding_mask_crop=[4, None], batch_size=2)
    mixed = inferencer(['a', 'b'], seed=5, **both, **SIZE)
    assert [i.size for i in mixed] == [(120, 90), (64, 48)]
    for more, sentence in ((dict(output_type='pt'), "output_type='pt' does not go with padding_mask_crop"),
                           (dict(mask_image=mask()), 'one size; they are 120 x 90 and 64 x 64 pixels'),
                           (dict(mask_image=Image.new('L', image.size)), 'not black in mask_image, and all of it is'),
                           (dict(image=torch.zeros(3, 90, 120)), 'files, PIL images or arrays of uint8')):
        with pytest.raises(UserError, match=sentence):
            inferencer(**{**dict(prompt=PROMPT, image=image, mask_image=where, padding_mask_crop=4), **SIZE, **more})


def test_clip_skip(inferencer: SDXLInferencer, pipelines: dict[str, Any]) -> None:
    """Of the prompts only; in a batch of several values each has its own."""
    call: dict[str, Any] = dict(prompt=PROMPT, negative_prompt='blurry', output_type='pt', **SIZE)
    pairs = [(inferencer(**call, seed=5, clip_skip=skip), asked(pipelines[BASE], **call, clip_skip=skip))
             for skip in (None, 0, 1)]
    assert all(torch.equal(got, expected) for got, expected in pairs)
    assert torch.equal(pairs[0][0], pairs[1][0]) and not torch.equal(pairs[0][0], pairs[2][0])
    both = inferencer(**{**call, 'prompt': [PROMPT] * 2}, seed=5, clip_skip=[None, 1], batch_size=2)
    assert torch.equal(both, torch.cat([pairs[0][0], pairs[2][0]]))


def test_the_refiner_skips_by_itself(refined: Refined) -> None:
    """The base's clip_skip is not the refiner's, which is told its own."""
    def jobs(**call: Any) -> list[int | None]:
        job, = refined.ours.preprocess([refined.ours.request(dict(prompt=PROMPT, **SIZE, **call))])
        assert job.second is not None
        return [job.first.batch.clip_skip, job.second.batch.clip_skip]
    assert jobs(clip_skip=1) == [1, None] and jobs(clip_skip=1, refiner=dict(clip_skip=0)) == [1, 0]


def counted(ours: SDXLInferencer) -> list[int]:
    """Rows of each call of the first text encoder of the base, from now on."""
    rows: list[int] = []
    ours.model.text_encoder.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    return rows


def test_prompts_are_encoded_once(tiny_base: Path) -> None:
    """In one call, whatever the seeds; anew in the next, as weights may have changed; bitwise as if each were alone."""
    ours = SDXLInferencer(config(tiny_base, steps=1), device='cpu')
    rows = counted(ours)
    call: dict[str, Any] = dict(negative_prompt='ugly', output_type='pt', **SIZE)
    made = ours(['a', 'b', 'a'], seed=[1, 2, 3], num_images_per_prompt=2, **call)
    assert rows == [1, 1, 1]
    alone = [ours(p, seed=s + k, **call) for p, s in (('a', 1), ('b', 2), ('a', 3)) for k in range(2)]
    assert torch.equal(made, torch.cat(alone)) and len(rows) == 15
    rows.clear()
    asked_for = [dict(prompt_2='a++'), dict(clip_skip=1), dict(prompt_2='c'), dict(prompt_syntax='compel'), {}]
    call = dict(seed=1, output_type='pt', **SIZE)
    together = ours(['a++'] * 5, **{name: [one.get(name) for one in asked_for]
                                    for name in ('prompt_2', 'clip_skip', 'prompt_syntax')}, **call)
    apart = [ours('a++', **one, **call) for one in asked_for]  # type: ignore[arg-type]
    assert torch.equal(together, torch.cat(apart)) and len({float(one.sum()) for one in apart}) == 4
    call = dict(negative_prompt='ugly', output_type='pt', **SIZE)
    with torch.no_grad():
        for parameter in ours.model.text_encoder.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(ours('a', seed=1, **call), made[:1])
    rows.clear()
    batches = ours(['a', 'b', 'a', 'b', 'b', 'a'], seed=0, batch_size=2, **call)
    assert rows == [2, 2, 2] and batches.shape[0] == 6  # a b twice, b a, and the negatives of all


def test_what_is_remembered_is_bounded(tiny_base: Path) -> None:
    """So many rows, the longest unasked ones first; and nothing of it is left."""
    ours = SDXLInferencer(config(tiny_base, steps=1), device='cpu')
    rows = counted(ours)
    with ours.cached_inputs(), torch.no_grad():
        model = ours.model
        first = embed(model, ['x'], ['x'])
        for i in range(MAX_CACHED_ROWS):
            embed(model, [str(i)], [str(i)])
            assert embed(model, ['x'], ['x'])[0] is first[0]
        assert len(rows) == MAX_CACHED_ROWS + 1 and len(model.prompt_cache) == MAX_CACHED_ROWS
        embed(model, ['0'], ['0'])
        assert len(rows) == MAX_CACHED_ROWS + 2
        with ours.cached_inputs():
            assert embed(model, ['x'], ['x'])[0] is first[0]
        embed(model, ['a'] * 99, ['a'] * 99)
        assert len(model.prompt_cache) == 1
    assert model.prompt_cache is None


@pytest.mark.parametrize('kind', ['lora', 'textual_inversion'])
def test_adapters_of_the_text_are_told_apart(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    """Prompts that a LoRA reads with other scales are other prompts; new words are read as before."""
    case = CASES[kind]
    own = {**case.config, 'parts': ['text_encoder', 'text_encoder_2']} if kind == 'lora' else case.config
    model = shaken(build(tiny_base, dict(t=own)), case)
    model.adapters['t'].save(tmp_path / 't')
    adapter = {**own, 'weights': str(tmp_path / 't'), 'trainable': False}
    ours = SDXLInferencer(config(tiny_base, dict(t=adapter), steps=1), device='cpu')
    prompt = ' '.join(['a', *ours.model.adapters['t'].new_tokens()])
    call: dict[str, Any] = dict(seed=5, output_type='pt', **SIZE)
    scales = [0.5, 1.0, 0.5] if kind == 'lora' else [1.0] * 3
    rows = counted(ours)
    requests = [ours.request(dict(prompt=prompt, seed=5, scales=dict(t=s) if kind == 'lora' else {}, **SIZE))
                for s in scales]

    def made(how: Callable[[], Any]) -> torch.Tensor:
        with how():
            return torch.cat([ours.forward(job) for job in ours.preprocess(requests)])  # type: ignore[misc]
    once = made(ours.cached_inputs)
    assert len(rows) == len(set(scales))
    assert torch.equal(once, made(nullcontext)) and len(rows) == len(set(scales)) + 3
    assert torch.equal(once[0], once[2]) and torch.equal(once[0], once[1]) == (kind != 'lora')
    base = ours(prompt, **call)
    with ours.cached_inputs():
        assert torch.equal(ours(prompt, **call), base)
        with ours.model.disable_adapters():
            assert not torch.equal(ours(prompt, **call), base)


def test_a_shared_encoder_is_remembered_by_each_model(refined: Refined) -> None:
    """Base and refiner read the same prompt with one encoder and keep what is theirs."""
    call: dict[str, Any] = dict(denoising_end=0.6, num_inference_steps=3, seed=5, output_type='pt', **SIZE)
    rows: list[int] = []
    handle = refined.ours.model.text_encoder_2.register_forward_hook(lambda _m, _a, out: rows.append(len(out[0])))
    made = refined.ours(PROMPT, num_images_per_prompt=3, **call)
    handle.remove()
    assert len(rows) == 3  # the base's, the refiner's, and the empty prompt that its null is
    assert torch.equal(made, torch.cat([refined.ours(PROMPT, **{**call, 'seed': 5 + k}) for k in range(3)]))


def test_an_address_is_fetched_once(inferencer: SDXLInferencer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
    """Of all pictures of a call, and for their size; again in the next call."""
    picture().save(tmp_path / 'i.png')
    fetched: list[str] = []

    def fetch(url: str, what: str) -> bytes:
        fetched.append(url)
        return (tmp_path / 'i.png').read_bytes()
    monkeypatch.setattr('diffengine_sdxl.models.image_inputs.fetch', fetch)
    monkeypatch.setattr(images, 'fetch', fetch)
    call: dict[str, Any] = dict(seed=5, strength=0.7, output_type='pt')
    urls = ['http://127.0.0.1/i.png', 'https://127.0.0.1/m.png']
    made = inferencer(['a', 'b'], image=urls[0], mask_image=urls[1], num_images_per_prompt=2, **call)
    assert fetched == urls
    assert torch.equal(inferencer(['a', 'b'], image=tmp_path / 'i.png', mask_image=tmp_path / 'i.png',
                                  num_images_per_prompt=2, **call), made)
    inferencer('a', image=urls[0], **call)
    assert fetched == [*urls, urls[0]]
    # What is too much to remember is fetched again.
    monkeypatch.setattr('diffengine_sdxl.models.image_inputs.MAX_CACHED_BYTES', 10)
    fetched.clear()
    inferencer('a', image=urls[0], **call)
    assert len(fetched) > 1
