"""Adapters of LyCORIS' and other kinds in use: training, precision, other adapters around; alphas, words, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_loras import (
    LAYERS,
    MIXED,
    NORMS,
    Tensors,
    assert_near,
    attached,
    make,
    merged,
    modules,
    output,
    predict,
    write,
)
from parity import make_batch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats import kohya, lora, lora_weights
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import ADAPTERS


def test_gradients_are_those_of_the_formula(model64: SDXL, tmp_path: Path) -> None:
    """Full differences, biases, norms and magnitudes train, and low-rank factors beside them; the norm is constant."""
    unet = [name for name in (*LAYERS, *NORMS) if name.startswith('unet.')]
    forms = dict(zip(unet, ('DoRA of the inputs', 'full', 'LoRA and bias', 'LoKr, DoRA', 'full and bias', 'norm',
                            'norm', 'norm'), strict=True))
    tensors, _ = make(model64, forms)
    with attached(model64, write(tmp_path / 'a.safetensors', tensors), trainable=True) as adapter:
        for parameter in adapter.trainables():
            parameter.requires_grad_()
        predict(model64).square().sum().backward()
        assert len(adapter.trainables()) == sum(not key.endswith('.alpha') for key in tensors)
        found = {f'unet.{name}.{key}': p.grad for name, wrapper in lora_layers.layers(model64.unet, 'a').items()
                 for key, p in lora_layers.weights(wrapper, 'a').items()}
    leaves: Tensors = {}
    plain: dict[str, tuple[nn.Parameter, Any]] = {}
    for name in forms:
        layer: Any = model64.get_submodule(name)
        own = {lora_weights_name(key.split('.', 1)[1]): value.clone().requires_grad_(not key.endswith('alpha'))
               for key, value in tensors.items() if key.split('.', 1)[0] == (LAYERS | NORMS)[name]}
        leaves |= {f'{name}.{key}': value for key, value in own.items() if key != 'alpha'}
        plain[name] = layer.weight, layer.bias
        weight, bias = layer.weight, layer.bias
        if 'lora_A.weight' in own:
            change = own['lora_B.weight'].flatten(1) @ own['lora_A.weight'].flatten(1)
            weight = weight + 2 / 3 * change.view(weight.shape)
        elif 'lokr_w1' in own:
            weight = weight + torch.kron(own['lokr_w1'][..., None, None], own['lokr_w2']) if weight.dim() == 4 else (
                weight + torch.kron(own['lokr_w1'], own['lokr_w2']))
        else:
            weight = weight + own.get('diff', own.get('w_norm', 0))
        if 'dora_scale' in own:
            axes = [axis for axis in range(weight.dim()) if axis != int(own['dora_scale'].shape[0] == 1)]
            weight = own['dora_scale'] * weight / torch.linalg.vector_norm(weight.detach(), dim=axes, keepdim=True)
        extra = own.get('diff_b', own.get('b_norm'))
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias if extra is None else bias + extra
    predict(model64).square().sum().backward()
    for name, (weight, bias) in plain.items():
        layer = model64.get_submodule(name)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
    assert found.keys() == leaves.keys()
    for key, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.norm() > 0
        assert (found[key].reshape(leaf.shape) - leaf.grad).norm() <= 1e-9 * leaf.grad.norm(), key


def lora_weights_name(suffix: str) -> str:
    return {'lora_up.weight': 'lora_B.weight', 'lora_down.weight': 'lora_A.weight'}.get(suffix, suffix)


def test_rows_blocks_and_others(model64: SDXL, tmp_path: Path) -> None:
    """An active range gates rows; a block has its scale; a LoRA around it adds to it; all leave nothing behind."""
    forms = {name: form for name, form in MIXED.items() if name.startswith('unet.')}
    tensors, at = make(model64, forms)
    path, before = write(tmp_path / 'a.safetensors', tensors), output(model64)
    with attached(model64, path, active_range=(0.0, 0.5)):
        inside, half = output(model64, (0.1, 0.1)), predict(model64, (0.1, 0.9))
    assert torch.equal(half[0], inside[0]) and torch.equal(half[1], before[1]) and not torch.equal(inside[1], before[1])
    blocks = {'unet.mid_block': {'scale': 0.5}}
    weights = {key: value for key, value in at(1).items() if not key.startswith('unet.mid_block')}
    weights |= {key: value for key, value in at(0.5).items() if key.startswith('unet.mid_block')}
    with merged(model64, weights):
        expected = output(model64)
    with attached(model64, path, blocks=blocks):
        assert_near(output(model64), expected, before)
    additive = {name: form for name, form in forms.items() if 'DoRA' not in form}
    tensors, at = make(model64, additive)
    other, other_at = make(model64, dict.fromkeys([name for name in additive if name in LAYERS], 'LoRA'), seed=6)
    base = {key: model64.get_parameter(key).detach() for key in at(1)}
    with merged(model64, {key: value + other_at(1).get(key, base[key]) - base[key] for key, value in at(1).items()}):
        expected = output(model64)
    files = {'a': write(tmp_path / 'a2.safetensors', tensors), 'b': write(tmp_path / 'b2.safetensors', other)}
    for first, second in (('a', 'b'), ('b', 'a')):
        with attached(model64, files[first], first), attached(model64, files[second], second):
            assert_near(output(model64), expected, before)
    assert torch.equal(output(model64), before)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_files_in_low_precision(model64: SDXL, tmp_path: Path, dtype: torch.dtype) -> None:
    """Equal to the same numbers in fp32; fp8 too, whose arithmetic torch does not have."""
    tensors, _ = make(model64, MIXED)
    low = {key: value.to(dtype) for key, value in tensors.items()}
    outputs = []
    for name, file in (('low', low), ('fp32', {key: value.float() for key, value in low.items()})):
        with attached(model64, write(tmp_path / f'{name}.safetensors', file)):
            outputs.append(output(model64))
    assert torch.equal(*outputs)


def test_half_precision_of_the_base(tiny_base: Path, model64: SDXL, tmp_path: Path) -> None:
    """Frozen weights have the base's dtype, trained ones fp32; both compute, near the exact output."""
    tensors, at = make(model64, MIXED)
    path = write(tmp_path / 'a.safetensors', {key: value.float() for key, value in tensors.items()})
    with merged(model64, at(1)):
        expected = output(model64)
    model = SDXL(pretrained=str(tiny_base), mixed_precision='bf16', adapters={
        'a': {'type': 'LoRA', 'weights': str(path), 'trainable': False}})
    assert {p.dtype for p in model.adapters['a'].all_parameters()} == {torch.bfloat16}
    assert (output(model).double() - expected).norm() < 0.1 * expected.norm()
    trained = SDXL(pretrained=str(tiny_base), mixed_precision='bf16', objective={'type': 'Denoise'}, adapters={
        'a': {'type': 'LoRA', 'weights': str(path)}})
    assert {p.dtype for p in trained.adapters['a'].trainables()} == {torch.float32}
    trained(make_batch(2), mode='loss')['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.adapters['a'].trainables())
    assert set(trained.state_dict()) == {n for n, p in trained.named_parameters() if p.requires_grad}


# Alphas, words, refusals

KEY = 'lora_unet_middle_block_2_out_layers_3'


def test_alphas_of_zero_and_below(model64: SDXL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 changes nothing and is said; a negative one subtracts; each survives writing."""
    tensors, at = make(model64, dict.fromkeys(LAYERS, 'LoRA'))
    before, said = output(model64), []
    monkeypatch.setattr(lora, 'log_loaded', lambda what, *_: said.append(what))
    with merged(model64, at(-1)):
        expected = output(model64)
    for alpha in (0.0, -2.0):
        file = {key: torch.tensor(alpha) if key.endswith('.alpha') else value for key, value in tensors.items()}
        with attached(model64, write(tmp_path / 'a.safetensors', file)) as adapter:
            adapter.save(tmp_path / 'folder')
            kohya.write(tmp_path / 'again.safetensors', adapter.to_weights(), modules(model64))
        for source in ('a.safetensors', 'folder', 'again.safetensors'):
            with attached(model64, tmp_path / source):
                if alpha:
                    assert_near(output(model64), expected, before)
                else:
                    assert torch.equal(output(model64), before)
        assert ('7 layers have alpha=0' in said[-1]) == (alpha == 0)


@pytest.mark.parametrize(('change', 'said'), [
    (lambda t: {k: torch.tensor(float('nan')) if k.endswith('.alpha') else v for k, v in t.items()},
     r"\.alpha' is nan; it must be a finite number \(7 such layers: lora_te1"),
    (lambda t: {**t, f'{KEY}.alpha': torch.tensor(float('-inf'))}, rf"'{KEY}.alpha' is -inf.*1 such layers"),
    (lambda t: {**t, f'{KEY}.alpha': torch.tensor(2 + 1j)}, rf"'{KEY}.alpha' is \(2\+1j\)"),
    (lambda t: {**t, f'{KEY}.lora_down.weight': torch.zeros(0, 64, 3, 3),
                f'{KEY}.lora_up.weight': torch.zeros(64, 0, 1, 1)},
     rf"'{KEY}' has rank 0 \(.*lora_down.weight \[0, 64, 3, 3\].*ignore_keys=\['{KEY}\.\*'\]"),
    (lambda t: {**t, f'{KEY}.diff_b': torch.zeros(63)}, r'diff_b \[63\]; its bias has 64 channels'),
    (lambda t: {**t, 'lora_unet_out_0.w_norm': torch.zeros(31)}, r'a norm of 16 channels has w_norm and b_norm'),
    (lambda t: {**t, f'{KEY}.w_norm': torch.zeros(64)}, rf'missing \({KEY}'),
    (lambda t: {**t, f'{KEY}.dora_scale': torch.ones(1, 63, 1, 1)},
     r'magnitudes \[1, 63, 1, 1\]; .* 64 output and 64 in'),
    (lambda t: {**t, f'{KEY}.diff': torch.zeros(64, 64, 3, 3)}, rf'missing \({KEY}'),
    (lambda t: {**t, f'{KEY}.oft_R.weight': torch.zeros(2, 3)}, "holds OneTrainer's OFT in 1 keys"),
    (lambda t: {**t, 'lora_unet_nothing.diff': torch.zeros(2)}, r'1 unknown \(lora_unet_nothing.diff\).*ignore_keys'),
    (lambda t: {k.replace('te1', 'te'): v for k, v in t.items() if 'te1' in k}, 'named as Stable Diffusion 1.x'),
])
def test_what_is_refused(model64: SDXL, change: Callable[[Tensors], Tensors], said: str) -> None:
    tensors, _ = make(model64, dict.fromkeys(LAYERS, 'LoRA'))
    with pytest.raises(UserError, match=said):
        kohya.read(change(tensors), modules(model64), 'a.safetensors')


def test_a_mixture_in_the_adapter(model64: SDXL, tmp_path: Path) -> None:
    """It is named by what it holds; saved as one file that it loads again, in place too; arguments are compared."""
    tensors, at = make(model64, MIXED)
    path, before = write(tmp_path / 'a.safetensors', tensors), output(model64)
    with merged(model64, at(1)):
        expected = output(model64)
    with attached(model64, path) as adapter:
        assert adapter.kind == ('norms, biases, LoRA, full differences, LoRA with DoRA of the inputs, LoKr with DoRA, '
                                'LoRA with DoRA and LoHa r3-16')
        adapter.save(tmp_path / 'folder')
        with torch.no_grad():
            for parameter in adapter.all_parameters():
                parameter.mul_(2)
        adapter.load(tmp_path / 'folder')
        assert_near(output(model64), expected, before)
        with pytest.raises(UserError, match='cannot scale or remove norms'):
            adapter.add_to_pipeline(None)
    with attached(model64, tmp_path / 'folder', ignore_keys=['*_norm', '*.dora_scale']) as adapter:
        assert 'norms' not in adapter.kind and 'DoRA' not in adapter.kind
    for settings, said in (({'kind': 'lora'}, "kind='lora', but .* has 'norms, biases"),
                           ({'rank': 5}, 'rank of unet.*has 3'),
                           ({'dropout': 0.5, 'trainable': True}, 'dropout=0.5, which is not possible for norms'),
                           ({'ignore_keys': ['*_nrom']}, r"'\*_nrom' matches no key")):
        with pytest.raises(UserError, match=said), attached(model64, path, **settings):
            pass
    assert torch.equal(output(model64), before)


WORD = '<my.word>'


def test_bundled_words(model64: SDXL, tmp_path: Path) -> None:
    """They are read in prompts as those of a TextualInversion, and come back from what is saved."""
    tensors, _ = make(model64, dict.fromkeys(LAYERS, 'LoRA'))
    widths = [getattr(model64, part).get_input_embeddings().weight.shape[1] for part in lora_weights.PARTS[1:]]
    vectors = {encoder: torch.randn(2, width) for encoder, width in zip(('clip_l', 'clip_g'), widths, strict=True)}
    bundle = {f'bundle_emb.{WORD}.{encoder}': value for encoder, value in vectors.items()}
    path = write(tmp_path / 'a.safetensors', {**tensors, **bundle})
    save_file(vectors, tmp_path / 'word.safetensors')

    def text() -> Tensor:
        with torch.no_grad():
            return model64.encode(make_batch(2, text=[f'a {WORD} square', 'a circle'])).text
    inversion = ADAPTERS.build({'type': 'TextualInversion', 'token': WORD,
                                'weights': str(tmp_path / 'word.safetensors')})
    inversion.name = 'word'
    inversion.attach(model64)
    with attached(model64, write(tmp_path / 'b.safetensors', tensors)):
        without, model64.adapters['word'] = text(), inversion
        expected = text()
        del model64.adapters['word']
    assert not torch.equal(expected, without)
    with attached(model64, path) as adapter:
        assert torch.equal(text(), expected) and not adapter.trainables()
        adapter.save(tmp_path / 'folder')
        adapter.words.get_buffer('text_encoder_0').zero_()
        adapter.load(tmp_path / 'folder')
        assert torch.equal(text(), expected)
        with pytest.raises(UserError, match=f"also changes text_encoder, text_encoder_2, the word '{WORD}'"):
            adapter.active_range = (0, 0.5)
        adapter.scale = 0
        assert not adapter.new_tokens()
    with attached(model64, tmp_path / 'folder'):
        assert torch.equal(text(), expected)
    with attached(model64, path, ignore_keys=['bundle_emb.*']):
        assert torch.equal(text(), without)
    for other, said in (({f'bundle_emb.{WORD}.clip_l_out': torch.zeros(2, 4)},
                         'form that is not read: bundle_emb.*_out'),
                        ({f'bundle_emb.{WORD}.clip_l': torch.zeros(2, 3)}, 'are 3 wide for text_encoder'),
                        ({f'bundle_emb.{WORD}.clip_l': torch.zeros(3, widths[0])}, '3 vectors for text_encoder and 2')):
        with pytest.raises(UserError, match=said), attached(
                model64, write(tmp_path / 'c.safetensors', {**tensors, **bundle, **other})):
            pass
