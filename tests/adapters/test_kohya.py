"""kohya's, LyCORIS' and ComfyUI's single files, against merging: W + dW by the formula, in the base itself, no peft.

Files are made here by hand, under both sets of names. fp64 throughout shows that the rules are right (1e-10); fp32 is
allowed 1e-5, as two orders of the same sums differ by that.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import original_format
import pytest
import torch
from parity import PROMPTS, generators, make_batch, picture_batch, sampler, stock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats import kohya
from diffengine_sdxl.adapters.formats.layer_names import file_names
from diffengine_sdxl.loading import single_file
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import tiny_unet, write_tiny_sdxl

PARTS = ('unet', 'text_encoder', 'text_encoder_2')
#: Layers of every sort, with their names in files written out by hand (layers_per_block=1).
LAYERS = {
    'unet': {
        'conv_in': 'input_blocks_0_0', 'conv_out': 'out_2', 'time_embedding.linear_1': 'time_embed_0',
        'add_embedding.linear_2': 'label_emb_0_2', 'down_blocks.0.resnets.0.conv1': 'input_blocks_1_0_in_layers_2',
        'down_blocks.0.downsamplers.0.conv': 'input_blocks_2_0_op',
        'down_blocks.1.resnets.0.conv_shortcut': 'input_blocks_3_0_skip_connection',
        'down_blocks.1.attentions.0.proj_in': 'input_blocks_3_1_proj_in',
        'down_blocks.2.attentions.0.transformer_blocks.1.attn2.to_k':
            'input_blocks_5_1_transformer_blocks_1_attn2_to_k',
        'mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0':
            'middle_block_1_transformer_blocks_0_attn1_to_out_0',
        'mid_block.resnets.1.conv2': 'middle_block_2_out_layers_3',
        'up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj':
            'output_blocks_1_1_transformer_blocks_0_ff_net_0_proj',
        'up_blocks.0.upsamplers.0.conv': 'output_blocks_1_2_conv',
        'up_blocks.1.resnets.1.time_emb_proj': 'output_blocks_3_0_emb_layers_1',
        'up_blocks.2.resnets.0.conv1': 'output_blocks_4_0_in_layers_2'},
    'text_encoder': {'encoder.layers.0.self_attn.q_proj': 'text_model_encoder_layers_0_self_attn_q_proj',
                     'encoder.layers.0.mlp.fc2': 'text_model_encoder_layers_0_mlp_fc2'},
    'text_encoder_2': {
        'text_model.encoder.layers.1.self_attn.out_proj': 'text_model_encoder_layers_1_self_attn_out_proj',
        'text_projection': 'text_projection'}}
PREFIX = {'unet': 'lora_unet_', 'text_encoder': 'lora_te1_', 'text_encoder_2': 'lora_te2_'}
Tensors = dict[str, Tensor]
Form = tuple[dict[str, tuple[int, ...]], Callable[[Tensors], Tensor], float]


def lora(shape: tuple[int, ...], rank: int = 3, alpha: float | None = 2.0) -> Form:
    """Shapes of a layer's tensors, the change of its weight, and alpha (0: not given)."""
    out, wide, *kernel = shape
    ones = [1] * len(kernel)
    return ({'lora_up.weight': (out, rank, *ones), 'lora_down.weight': (rank, wide, *kernel)},
            lambda t: torch.einsum('or,r...->o...', t['lora_up.weight'].flatten(1), t['lora_down.weight'])
            * ((alpha or rank) / rank), alpha or 0.0)


def no_alpha(shape: tuple[int, ...]) -> Form:
    return lora(shape, alpha=None)


def locon(shape: tuple[int, ...]) -> Form:
    """With a Tucker core where there is a kernel."""
    if shape[2:] != (3, 3):
        return lora(shape)
    side = {'lora_up.weight': (shape[0], 3, 1, 1), 'lora_down.weight': (3, shape[1], 1, 1)}
    return ({**side, 'lora_mid.weight': (3, 3, 3, 3)},
            lambda t: torch.einsum('or,rskl,si->oikl', t['lora_up.weight'][..., 0, 0], t['lora_mid.weight'],
                                   t['lora_down.weight'][..., 0, 0]) * 2 / 3, 2.0)


def loha(shape: tuple[int, ...]) -> Form:
    flat = math.prod(shape[1:])
    # peft holds a LoHa's alpha / rank in fp32 even in an fp64 model, so here it is a number that fp32 has.
    return ({'hada_w1_a': (shape[0], 3), 'hada_w1_b': (3, flat), 'hada_w2_a': (shape[0], 3), 'hada_w2_b': (3, flat)},
            lambda t: (t['hada_w1_a'] @ t['hada_w1_b'] * (t['hada_w2_a'] @ t['hada_w2_b'])).view(shape) * 0.5, 1.5)


def loha_tucker(shape: tuple[int, ...]) -> Form:
    if shape[2:] != (3, 3):
        return loha(shape)
    side = {f'hada_w{i}_{s}': (3, n) for i in (1, 2) for s, n in zip('ab', shape[:2], strict=True)}

    def half(t: Tensors, i: int) -> Tensor:
        return torch.einsum('rskl,ro,si->oikl', t[f'hada_t{i}'], t[f'hada_w{i}_a'], t[f'hada_w{i}_b'])
    return ({**side, 'hada_t1': (3, 3, 3, 3), 'hada_t2': (3, 3, 3, 3)}, lambda t: half(t, 1) * half(t, 2) * 0.5, 1.5)


def lokr(shape: tuple[int, ...], split1: bool = False, split2: bool = False, tucker: bool = False) -> Form:
    """kron(w1 of 2 x 2, w2); alpha counts only where one of them is a product."""
    out, wide, *kernel = shape[0] // 2, shape[1] // 2, *shape[2:]
    tucker = tucker and kernel == [3, 3]
    first: dict[str, tuple[int, ...]] = {'lokr_w1_a': (2, 1), 'lokr_w1_b': (1, 2)} if split1 else {'lokr_w1': (2, 2)}
    second: dict[str, tuple[int, ...]] = {'lokr_w2': (out, wide, *kernel)}
    if tucker:
        second = {'lokr_w2_a': (1, out), 'lokr_w2_b': (1, wide), 'lokr_t2': (1, 1, 3, 3)}
    elif split2:
        second = {'lokr_w2_a': (out, 1), 'lokr_w2_b': (1, wide * math.prod(kernel))}

    def change(t: Tensors) -> Tensor:
        w1 = t['lokr_w1_a'] @ t['lokr_w1_b'] if split1 else t['lokr_w1']
        if tucker:
            w2 = torch.einsum('rskl,ro,si->oikl', t['lokr_t2'], t['lokr_w2_a'], t['lokr_w2_b'])
        else:
            w2 = t['lokr_w2_a'] @ t['lokr_w2_b'] if split2 else t['lokr_w2']
        return torch.einsum('ab,cdk->acbdk', w1, w2.reshape(out, wide, -1)).reshape(shape) * (
            0.5 if split1 or split2 or tucker else 1)
    return {**first, **second}, change, 0.5


FORMS: dict[str, tuple[Callable[[tuple[int, ...]], Form], str]] = {
    'lora': (lora, 'lora'), 'no alpha': (no_alpha, 'lora'), 'locon': (locon, 'lora'), 'dora': (lora, 'dora'),
    'loha': (loha, 'loha'), 'loha tucker': (loha_tucker, 'loha'), 'lokr': (lokr, 'lokr'),
    'lokr w2': (lambda s: lokr(s, split2=True), 'lokr'),
    'lokr both': (lambda s: lokr(s, split1=True, split2=True), 'lokr'),
    'lokr tucker': (lambda s: lokr(s, split2=True, tucker=True), 'lokr')}


def modules(model: Any) -> dict[str, dict[str, nn.Module]]:
    return {part: lora_layers.plain(getattr(model, part)) for part in PARTS}


def make(model: Any, form: str, original: bool = True, parts: tuple[str, ...] = PARTS,
         dtype: torch.dtype = torch.float32) -> tuple[Tensors, dict[str, Tensor]]:
    """A file's tensors, and the changed weight (fp64) of each layer by its full name; a change is 0.3 of a weight."""
    random = torch.Generator().manual_seed(7)
    tensors: Tensors = {}
    changed = {}
    for part in parts:
        for name, file in LAYERS[part].items():
            weight = getattr(model, part).get_submodule(name).weight.detach().double()
            shapes, change, alpha = FORMS[form][0](tuple(weight.shape))
            own = {k: torch.randn(s, generator=random, dtype=torch.float64) for k, s in shapes.items()}
            first = next(iter(own))
            own[first] *= 0.3 * weight.norm() / change(own).norm()
            own = {k: v.to(dtype) for k, v in own.items()}
            new = weight + change({k: v.double() for k, v in own.items()})
            if alpha:
                own['alpha'] = torch.tensor(alpha)
            if form == 'dora':
                norms = new.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
                own['dora_scale'] = (norms * (0.5 + torch.rand(norms.shape, generator=random))).to(dtype)
                new = own['dora_scale'].double() * new / norms
            file = file if original else name.replace('.', '_') if part == 'unet' else file
            tensors |= {f'{PREFIX[part]}{file}.{k}': v for k, v in own.items()}
            changed[f'{part}.{name}'] = new
    return tensors, changed


def merged(base: Path, changed: Mapping[str, Tensor], **settings: Any) -> SDXL:
    """The base with other weights."""
    model = SDXL(pretrained=str(base), **settings)
    with torch.no_grad():
        for name, weight in changed.items():
            model.get_parameter(f'{name}.weight').copy_(weight)
    return model


@torch.no_grad()
def prediction(model: SDXL) -> Tensor:
    """Of the denoiser, for two prompts and the same noise."""
    random = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 4, 8, 8, generator=random), torch.tensor([40, 800])
    return model.predict(x, t, model.encode(make_batch(2), project=True), torch.zeros(2, 2))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    far = float((found.double() - expected.double()).norm() / expected.double().norm())
    assert far <= tolerance, far


# Names

def test_the_names_are_those_of_sdxl() -> None:
    """All layers of the real one, against names written by walking its modules."""
    unet = single_file.empty_model('unet', single_file.SDXL_FILES)
    names = file_names({'unet': dict(unet.named_modules())})['unet']
    originals = {key.rpartition('.')[0].replace('.', '_') for key in original_format.unet_tensors(unet)}
    assert {original.removeprefix('lora_unet_') for original, _ in names.values()} <= originals
    assert all(other == 'lora_unet_' + name.replace('.', '_') for name, (_, other) in names.items())
    by_hand = {'input_blocks_4_1': 'down_blocks.1.attentions.0', 'input_blocks_5_1': 'down_blocks.1.attentions.1',
               'input_blocks_7_1': 'down_blocks.2.attentions.0', 'input_blocks_8_1': 'down_blocks.2.attentions.1',
               'middle_block_1': 'mid_block.attentions.0',
               **{f'output_blocks_{i}_1': f'up_blocks.{i // 3}.attentions.{i % 3}' for i in range(6)}}
    assert {names[f'{name}.proj_in'][0] for name in by_hand.values()} == {
        f'lora_unet_{file}_proj_in' for file in by_hand} == {n for n, _ in names.values() if n.endswith('1_proj_in')}
    assert names['up_blocks.1.upsamplers.0.conv'][0] == 'lora_unet_output_blocks_5_2_conv'
    assert len(names) == 794 and len({n for pair in names.values() for n in pair}) == 2 * 794


@pytest.mark.parametrize('layers', [1, 2])
def test_an_upsampler_without_transformers_and_a_missing_mid_block(layers: int) -> None:
    """Other layouts are numbered by the same rule."""
    unet = tiny_unet(layers_per_block=layers, up_block_types=('UpBlock2D',) * 3, mid_block_type=None)
    names = file_names({'unet': dict(unet.named_modules())})['unet']
    assert names['up_blocks.0.upsamplers.0.conv'][0] == f'lora_unet_output_blocks_{layers}_1_conv'
    assert not any('middle' in n for pair in names.values() for n in pair)


# Reading

@pytest.mark.parametrize('original', [True, False], ids=['original names', "diffusers' names"])
@pytest.mark.parametrize('form', FORMS)
def test_every_form_is_the_merged_base(tiny_base: Path, tmp_path: Path, form: str, original: bool) -> None:
    """UNet, both text encoders, linear layers and convolutions; fp64 and fp32."""
    for dtype, tolerance in (('float64', 1e-10), ('float32', 1e-5)):
        base = SDXL(pretrained=str(tiny_base), dtype=dtype)
        tensors, changed = make(base, form, original, dtype=getattr(torch, dtype))
        save_file(tensors, tmp_path / 'a.safetensors')
        plain = prediction(base)
        expected = prediction(merged(tiny_base, changed, dtype=dtype))
        assert (expected - plain).norm() > 0.05 * plain.norm()
        model = SDXL(pretrained=str(tiny_base), dtype=dtype, adapters=dict(a=dict(
            type='LoRA', weights=str(tmp_path / 'a.safetensors'))))
        assert_near(prediction(model), expected, tolerance)


def test_what_is_read(tiny_base: Path) -> None:
    """Kind, rank and alpha; tensors keep their dtype; some layers are enough; the scale is 1 for whole factors."""
    base = SDXL(pretrained=str(tiny_base))
    for form, (_, kind) in FORMS.items():
        tensors, changed = make(base, form, parts=('text_encoder_2', 'unet'), dtype=torch.bfloat16)
        assert kohya.is_kohya(tensors)
        found = kohya.read(tensors, modules(base), 'a.safetensors')
        assert (found.kind, list(found.parts), found.rslora) == (kind, ['unet', 'text_encoder_2'], False)
        assert {f'{part}.{name}' for part, held in found.parts.items() for name in held.rank} == set(changed)
        held = found.parts['unet']
        assert {v.dtype for k, v in held.tensors.items() if form != 'locon'} in ({torch.bfloat16}, set())
        scales = {held.alpha[name] / rank for name, rank in held.rank.items()}
        assert scales == {{'no alpha': 1.0, 'lokr': 1.0}.get(form, 2 / 3 if kind in ('lora', 'dora') else 0.5)}
    assert not kohya.is_kohya(['unet.conv_in.lora_A.weight', 'conv_in.lora_A.weight'])


def test_a_linear_layer_may_be_a_convolution_of_one(tiny_base: Path) -> None:
    """[r, in, 1, 1] for a linear layer and [r, in] for a 1 x 1 convolution: the same numbers."""
    base = SDXL(pretrained=str(tiny_base))
    tensors, _ = make(base, 'dora')
    expected = kohya.read(tensors, modules(base), 'a')
    flat = {k: v.flatten(1) if v.dim() == 4 and v.shape[2:] == (1, 1) else
            v[..., None, None] if v.dim() == 2 and 'lora_' in k.partition('.')[2] else v for k, v in tensors.items()}
    found = kohya.read(flat, modules(base), 'a')
    for part, held in expected.parts.items():
        assert all(torch.equal(found.parts[part].tensors[k], v) for k, v in held.tensors.items())


KEY = 'lora_unet_input_blocks_3_1_proj_in'
CONV = 'lora_unet_input_blocks_1_0_in_layers_2'


@pytest.mark.parametrize(('form', 'change', 'said'), [
    ('lora', lambda t: {**t, f'{KEY}.on_input': t[f'{KEY}.alpha']}, 'IA3'),
    ('lora', lambda t: {**t, f'{KEY}.a1.weight': t[f'{KEY}.alpha']}, 'GLoRA'),
    ('lora', lambda t: {**t, f'{KEY}.oft_blocks': t[f'{KEY}.alpha']}, 'diag-OFT in 1 keys.*peft'),
    ('lora', lambda t: {k.replace('unet', 'prior'): v for k, v in t.items()}, r'45 unknown \(lora_prior.* \.\.\.\)'),
    ('lora', lambda t: {**t, f'{KEY}.scalar': t[f'{KEY}.alpha']}, rf'1 unknown \({KEY}.scalar\)'),
    ('lora', lambda t: {k: v for k, v in t.items() if k != f'{KEY}.lora_up.weight'}, rf'1 missing \({KEY}.lora_up.w'),
    ('lora', lambda t: {k: v for k, v in t.items() if k[:len(KEY)] != KEY or 'alpha' in k}, '2 missing'),
    ('lora', lambda t: {**t, f'{KEY}.lora_down.weight': torch.ones(3, 48)},
     r"'down_blocks.1.attentions.0.proj_in' of the unet, changes a weight of 32 x 48.*32 x 32.*another base"),
    ('lora', lambda t: {**t, f'{KEY}.lora_down.weight': torch.ones(4, 32)}, 'do not go together: .*lora_up.weight'),
    ('dora', lambda t: {**t, f'{KEY}.dora_scale': torch.ones(48, 1)}, r'magnitudes \[48, 1\].*another base'),
    ('loha', lambda t: {**t, f'{KEY}.hada_w1_b': torch.ones(3, 31)}, 'do not go together'),
    ('loha tucker', lambda t: {k: v for k, v in t.items() if k != f'{CONV}.hada_t2'}, rf'1 missing \({CONV}.hada_t2'),
    ('lokr both', lambda t: {**t, f'{KEY}.lokr_w2': torch.ones(16, 16)}, f'missing.*{KEY}.*do not go together'),
    ('lokr', lambda t: {**t, f'{KEY}.lokr_w1': torch.ones(2, 4)}, 'changes a weight of 32 x 64'),
])
def test_what_cannot_be_read_exactly_is_refused(tiny_base: Path, tmp_path: Path, form: str,
                                                change: Callable[[Tensors], Tensors], said: str) -> None:
    """In words, with keys and their number; through the whole adapter too."""
    base = SDXL(pretrained=str(tiny_base))
    tensors = change(make(base, form)[0])
    with pytest.raises(ValueError, match=said):
        kohya.read(tensors, modules(base), tmp_path / 'a.safetensors')
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match=said):
        SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='LoRA', weights=str(tmp_path / 'a.safetensors'))))


# Writing

EVERYWHERE = dict(type='LoRA', rank=4, parts=PARTS,
                  targets=['to_q', 'attn2.to_v', 'q_proj', 'out_proj', 'conv1', 'conv_shortcut'])
WRITTEN: dict[str, dict[str, Any]] = {
    'lora': dict(alpha=8.0, blocks={'unet.mid_block': dict(rank=2, alpha=3.0)}),
    'one alpha': dict(alpha=8.0, blocks={
        'unet.mid_block': dict(rank=2, alpha=4.0), 'unet.down_blocks.1': dict(rank=3, alpha=2.0)}),
    'rslora': dict(alpha=6.0, rslora=True),
    'dora': dict(kind='dora', alpha=8.0), 'loha': dict(kind='loha', alpha=2.0),
    'lokr': dict(kind='lokr', alpha=3.0, rank=1),
    'lokr, whole': dict(kind='lokr', alpha=2.0, rank=64)}


def trained(base: Path, **settings: Any) -> SDXL:
    """An SDXL with a LoRA `a` that changes much."""
    model = SDXL(pretrained=str(base), adapters=dict(a={**EVERYWHERE, **settings}))
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.adapters['a'].trainables():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return model


@pytest.mark.parametrize('case', WRITTEN)
def test_what_is_written_is_read_the_same(tiny_base: Path, tmp_path: Path, case: str) -> None:
    """By us, bitwise but for the rounding of a factor; names, alphas and the metadata that tools show."""
    model, path = trained(tiny_base, **WRITTEN[case]), tmp_path / 'style.safetensors'
    weights = model.adapters['a'].to_weights()
    written = kohya.write(path, weights, modules(model), {'modelspec.author': 'me'})
    tensors = load_file(path)
    short = {'unet': 'unet', 'text_encoder': 'te1', 'text_encoder_2': 'te2'}
    assert written == len(tensors) and {k.split('_')[1] for k in tensors} == {short[p] for p in weights.parts}
    assert not any('down_blocks' in k or 'lora_A' in k for k in tensors)
    alphas = {float(v) for k, v in tensors.items() if 'unet' in k and k.endswith('.alpha')}
    assert alphas == {'lora': {3.0, 8.0}, 'one alpha': {2.0}, 'rslora': {12.0}, 'dora': {8.0}, 'loha': {2.0},
                      'lokr': {3.0}, 'lokr, whole': {64.0}}[case]
    other = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='LoRA', weights=str(path))))
    expected, found = prediction(model), prediction(other)
    if case in ('rslora', 'lokr, whole'):  # alpha * sqrt(rank) is no fp32 number; alpha / rank goes into a factor
        assert_near(found, expected, 1e-6)
    else:
        assert torch.equal(found, expected)
    assert (found - prediction(SDXL(pretrained=str(tiny_base)))).norm() > 0.05 * found.norm()
    with safe_open(path, framework='pt') as file:
        said = file.metadata()
    assert said['modelspec.architecture'] == 'stable-diffusion-xl-v1-base/lora' and said['modelspec.author'] == 'me'
    assert said['modelspec.title'] == 'style' and said['ss_base_model_version'] == 'sdxl_base_v1-0'
    kind = weights.kind
    assert said['ss_network_module'] == ('networks.lora' if kind == 'lora' else 'lycoris.kohya')
    algo = json.loads(said['ss_network_args'])
    assert algo == {'lora': {}, 'dora': {'algo': 'lora', 'dora_wd': 'True'}}.get(kind, {'algo': kind})
    assert (said['ss_network_dim'], said['ss_network_alpha']) == {
        'lora': ('Dynamic', 'Dynamic'), 'one alpha': ('Dynamic', 'Dynamic'), 'rslora': ('4', '12'), 'dora': ('4', '8'),
        'loha': ('4', '2'), 'lokr': ('1', '3'), 'lokr, whole': ('64', '64')}[case]
    data = path.read_bytes()
    assert hashlib.sha256(data[8 + int.from_bytes(data[:8], 'little'):]).hexdigest() == said['sshs_model_hash']
    assert said['modelspec.hash_sha256'] == '0x' + said['sshs_model_hash']


@pytest.mark.parametrize('settings', [
    WRITTEN['rslora'], WRITTEN['one alpha'],
    dict(alpha=8.0, blocks={'unet.mid_block': dict(rank=2), 'text_encoder': dict(rank=3, alpha=5.0)})])
def test_stock_reads_what_is_written(tiny_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Pictures, with blocks of other ranks, a part of another alpha, convolutions and both text encoders.

    Within a part diffusers 0.42 gives all attention layers the most frequent alpha, so there is one where it can be.
    """
    model, path = trained(tiny_base, **settings), tmp_path / 'a.safetensors'
    kohya.write(path, model.adapters['a'].to_weights(), modules(model))
    pipeline = stock(tiny_base)
    pipeline.load_lora_weights(str(path))
    for part in PARTS:
        getattr(pipeline, part).requires_grad_(False)
    theirs = pipeline(PROMPTS[:2], height=64, width=64, num_inference_steps=3, generator=generators([4, 2]),
                      output_type='latent').images
    assert_near(sampler(steps=3)(model, picture_batch(PROMPTS[:2], [4, 2])), theirs, 1e-5)
    other = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='LoRA', weights=str(path))))
    assert torch.equal(sampler(steps=3)(other, picture_batch(PROMPTS[:2], [4, 2])), theirs)


def test_fp64_survives(tiny_base: Path, tmp_path: Path) -> None:
    """rslora's factor too, as alpha is of the tensors' dtype."""
    model = SDXL(pretrained=str(tiny_base), dtype='float64', adapters=dict(a={**EVERYWHERE, **WRITTEN['rslora']}))
    weights = model.adapters['a'].to_weights()
    kohya.write(tmp_path / 'a.safetensors', weights, modules(model))
    found = kohya.read(load_file(tmp_path / 'a.safetensors'), modules(model), 'a')
    for part, held in weights.parts.items():
        assert all(torch.equal(found.parts[part].tensors[k], v) for k, v in held.tensors.items())
        assert {found.parts[part].alpha[name] for name in held.rank} == {12.0}


def test_oft_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(type='LoRA', kind='oft', rank=4)))
    with pytest.raises(ValueError, match='peft folder'):
        kohya.write(tmp_path / 'a.safetensors', model.adapters['a'].to_weights(), modules(model))
    assert not list(tmp_path.iterdir())


# Against stock

@pytest.mark.parametrize('original', [True, False], ids=['original names', "diffusers' names"])
@pytest.mark.parametrize('layers', [1, 2])
def test_stock_reads_the_same(tmp_path: Path, layers: int, original: bool) -> None:
    """A LoRA on every layer of the UNet and both encoders, alpha given; every one is where stock puts it."""
    folder = write_tiny_sdxl(tmp_path / 'base', layers_per_block=layers)
    base = SDXL(pretrained=str(folder))
    random = torch.Generator().manual_seed(1)
    tensors: Tensors = {}
    for part, names in file_names(modules(base)).items():
        for name, files in names.items():
            shape = tuple(getattr(base, part).get_submodule(name).weight.shape)
            own = {k: 0.1 * torch.randn(s, generator=random) for k, s in lora(shape)[0].items()}
            own['alpha'] = torch.tensor(2.0)
            tensors |= {f'{files[0 if original else -1]}.{k}': v for k, v in own.items()}
    save_file(tensors, tmp_path / 'a.safetensors')
    found = kohya.read(tensors, modules(base), 'a')
    pipeline = stock(folder)
    pipeline.load_lora_weights(str(tmp_path / 'a.safetensors'), adapter_name='a')
    lost = set()
    for part, held in found.parts.items():
        theirs = dict(getattr(pipeline, part).named_parameters())
        for key, value in held.tensors.items():
            name = re.sub(r'(lora_[AB])', r'\1.a', key)
            if name not in theirs:
                lost.add(key.partition('.lora_')[0])
                continue
            assert torch.equal(theirs[name], value), key
            wrapper = getattr(pipeline, part).get_submodule(key.partition('.lora_')[0])
            assert wrapper.scaling['a'] == 2 / 3 == held.alpha[key.partition('.lora_')[0]] / 3
    # diffusers 0.42 drops these without a word where a file has them under diffusers' own names.
    assert lost == (set() if original else {'add_embedding.linear_1', 'add_embedding.linear_2'})
    assert len(found.parts['unet'].rank) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in base.unet.modules())
