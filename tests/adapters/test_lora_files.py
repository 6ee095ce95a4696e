"""Files of LoRAs: bitwise what stock diffusers and plain peft make of them, theirs bitwise here, and bad ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.test_lora import ALL, CONVS, LAYERS, UNET, build, lora, shaken
from parity import PROMPTS, assert_same, generators, picture_batch, sampler, stock
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.testing import write_tiny_sdxl

SEEDS, FILE = [4, 2], 'pytorch_lora_weights.safetensors'


def pictures(model: SDXL) -> Tensor:
    """Latents of two pictures, three Euler steps."""
    return sampler(steps=3)(model, picture_batch(PROMPTS[:2], SEEDS))


def stock_pictures(pipeline: Any) -> Tensor:
    """The same of a stock pipeline, all frozen (see parity.stock)."""
    for part in ALL:
        getattr(pipeline, part).requires_grad_(False)
    return pipeline(PROMPTS[:2], height=64, width=64, num_inference_steps=3, generator=generators(SEEDS),
                    output_type='latent').images


def reread(base: Path, source: Path, **settings: Any) -> SDXL:
    """A model with what a file holds, nothing else said."""
    return SDXL(pretrained=str(base), adapters=dict(a=dict(type='LoRA', weights=str(source), **settings)))


STOCK = {
    'alpha, convolutions, feed-forward': lora(alpha=8, targets=UNET + CONVS),
    'both text encoders': lora(alpha=2, parts=ALL, targets=LAYERS),
    'a text encoder alone': lora(alpha=2, parts=ALL[2:]),
    'ranks and alphas by block, rslora': lora(
        alpha=6, rslora=True, parts=ALL, targets=[*LAYERS, 'conv2'], blocks={
            'unet.mid_block': dict(rank=2), 'unet.up_blocks.0': dict(rank=3, alpha=1.5),
            'text_encoder_2': dict(alpha=5),
            'unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q': dict(rank=7)}),
    'DoRA': lora(kind='dora', alpha=8, targets=UNET + CONVS),
}


@pytest.mark.parametrize('case', STOCK)
def test_stock_diffusers_loads_what_is_saved(tiny_base: Path, tmp_path: Path, case: str) -> None:
    """`load_lora_weights(folder)` alone makes bitwise the same pictures; and read back, the same weights."""
    model = build(tiny_base, STOCK[case])
    model.adapters['a'].save(tmp_path)
    pipeline = stock(tiny_base)
    without = stock_pictures(pipeline)
    pipeline.load_lora_weights(tmp_path)
    got = pictures(model)
    assert torch.equal(got, stock_pictures(pipeline)) and not torch.equal(got, without)
    given = reread(tiny_base, tmp_path)
    assert torch.equal(pictures(given), got)
    assert_same(dict(zip(model.state_dict(), given.adapters['a'].all_parameters(), strict=True)), model.state_dict())


def test_two_at_two_strengths_are_stocks(tiny_base: Path, tmp_path: Path) -> None:
    """At 1.0 and 1.4, bitwise `set_adapters`; scales of blocks are diffusers' dict (which is for attentions)."""
    for name, config in (('a', lora(targets=UNET, alpha=3)), ('b', lora(rank=3, alpha=8, parts=ALL)), ('c', lora())):
        build(tiny_base, config, name=name).adapters[name].save(tmp_path / name)
    model = SDXL(pretrained=str(tiny_base), adapters={
        'b': dict(type='LoRA', weights=str(tmp_path / 'b'), scale=1.4),
        'a': dict(type='LoRA', weights=str(tmp_path / 'a'))})
    pipeline = stock(tiny_base)
    for name in ('a', 'b'):
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    pipeline.set_adapters(['a', 'b'], [1.0, 1.4])
    assert torch.equal(pictures(model), stock_pictures(pipeline))
    blocks = {'unet.down_blocks': dict(scale=0.7), 'unet.mid_block': dict(scale=0.2), 'unet.up_blocks': dict(scale=1.3)}
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tmp_path / 'c', adapter_name='c')
    pipeline.set_adapters('c', {'unet': {'down': 0.7, 'mid': 0.2, 'up': 1.3}})
    assert torch.equal(pictures(reread(tiny_base, tmp_path / 'c', blocks=blocks)), stock_pictures(pipeline))


def peft_pictures(base: Path, folder: Path) -> Tensor:
    """The pictures of a stock pipeline into which plain peft puts `folder`'s parts."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    pipeline = stock(base)
    for path in folder.iterdir():
        module = getattr(pipeline, path.name)
        inject_adapter_in_model(PeftConfig.from_pretrained(str(path)), module, adapter_name='theirs')
        state = load_file(path / 'adapter_model.safetensors')
        result = set_peft_model_state_dict(module, state, adapter_name='theirs')
        assert not result.unexpected_keys and not [k for k in result.missing_keys if '.theirs' in k]
    return stock_pictures(pipeline)


@pytest.mark.parametrize('config', [
    lora(kind='loha', alpha=8, targets=LAYERS + CONVS, parts=ALL, blocks={'unet.mid_block': dict(rank=3, alpha=1)}),
    lora(kind='lokr', alpha=2, targets=LAYERS + CONVS, parts=ALL, blocks={'unet.mid_block': dict(rank=2)}),
    lora(kind='oft', targets=[*LAYERS, 'attn2.to_k'], parts=ALL),
    lora(kind='dora', alpha=8, targets=LAYERS, parts=ALL)], ids=lambda c: c['kind'])
def test_plain_peft_loads_what_diffusers_cannot(tiny_base: Path, tmp_path: Path, config: dict[str, Any],
                                                caplog: pytest.LogCaptureFixture) -> None:
    """A folder for each part, by peft alone bitwise the same pictures; it is said that stock cannot load it."""
    model = build(tiny_base, config)
    model.adapters['a'].save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(ALL)
    got = pictures(model)
    assert torch.equal(got, peft_pictures(tiny_base, tmp_path))
    assert torch.equal(pictures(reread(tiny_base, tmp_path)), got)
    single = reread(tiny_base, tmp_path, subfolder='text_encoder_2')
    assert list(single.adapters['a'].to_weights().parts) == ['text_encoder_2']


def test_what_peft_writes_is_read(tiny_base: Path, tmp_path: Path) -> None:
    """PeftModel.save_pretrained, with short targets, patterns, an OFT of the truncated series, a Tucker LoHa."""
    import peft
    configs = {
        'lora': peft.LoraConfig(r=4, lora_alpha=8, target_modules=['to_q', 'conv1'], init_lora_weights=False,
                                rank_pattern={'mid_block.*': 2}, alpha_pattern={'up_blocks.0.resnets.1.conv1': 3}),
        'oft': peft.OFTConfig(oft_block_size=4, target_modules=['to_q', 'to_k'], init_weights=False),
        'loha': peft.LoHaConfig(r=4, alpha=8, target_modules=['conv1', 'to_v'], init_weights=False,
                                use_effective_conv2d=True),
        'lokr': peft.LoKrConfig(r=2, alpha=3, target_modules=['to_q', 'conv1'], init_weights=False, decompose_both=True,
                                decompose_factor=4, use_effective_conv2d=True)}
    for kind, config in configs.items():
        pipeline = stock(tiny_base)
        torch.manual_seed(1)
        theirs = peft.get_peft_model(pipeline.unet, config)
        theirs.save_pretrained(str(tmp_path / kind))
        model = reread(tiny_base, tmp_path / kind)
        assert model.adapters['a'].method == kind
        assert torch.equal(pictures(model), stock_pictures(pipeline)), kind
        model.adapters['a'].save(tmp_path / f'{kind} again')
        again = reread(tiny_base, tmp_path / f'{kind} again')
        assert torch.equal(pictures(again), pictures(model)), kind


def test_what_diffusers_wrote_before_is_read(tiny_base: Path, tmp_path: Path) -> None:
    """Without metadata every alpha is the rank; '.lora.down', '.lora_linear_layer', processors, a pickle of tensors."""
    model = build(tiny_base, lora(parts=ALL))
    model.adapters['a'].save(tmp_path / 'new')
    state, got = load_file(tmp_path / 'new' / FILE), pictures(model)
    assert any(k.startswith('text_encoder.text_model.encoder.') for k in state)

    def older(key: str, side: str = '.lora') -> str:
        return key.replace('.lora_A.', f'{side}.down.').replace('.lora_B.', f'{side}.up.')

    def oldest(key: str) -> str:
        head, _, name = older(key, '_lora').replace('.to_out.0_', '.to_out_').rpartition('.to_')
        return f'{head}.processor.to_{name}' if head else key
    for rename in (str, older, lambda k: older(k, '.lora_linear_layer'), oldest):
        shutil.rmtree(tmp_path / 'old', ignore_errors=True)
        (tmp_path / 'old').mkdir()
        torch.save({rename(k): v for k, v in state.items()}, tmp_path / 'old' / 'pytorch_lora_weights.bin')
        assert torch.equal(pictures(reread(tiny_base, tmp_path / 'old')), got)
    alphas = {k.replace('lora_A.weight', 'alpha'): torch.tensor(2.0) for k in state if 'lora_A' in k}
    save_file(state | alphas, tmp_path / 'alphas.safetensors')
    half = build(tiny_base, lora(parts=ALL, alpha=2))
    assert torch.equal(pictures(reread(tiny_base, tmp_path / 'alphas.safetensors')), pictures(half))


def test_a_lokr_of_whole_matrices_becomes_a_peft_folder(tiny_base: Path, tmp_path: Path) -> None:
    """LyCORIS' file gives it no rank; peft makes whole matrices from a high enough one."""
    state = {f'lora_unet_mid_block_attentions_0_{name}.lokr_w{i}': torch.randn(8, 8)
             for name in ('proj_in', 'proj_out') for i in (1, 2)}
    save_file(state, tmp_path / 'lycoris.safetensors')
    model = reread(tiny_base, tmp_path / 'lycoris.safetensors')
    model.adapters['a'].save(tmp_path / 'peft')
    assert torch.equal(pictures(model), peft_pictures(tiny_base, tmp_path / 'peft'))
    layer = model.unet.mid_block.attentions[0].proj_in
    kron = torch.kron(*(state[f'lora_unet_mid_block_attentions_0_proj_in.lokr_w{i}'] for i in (1, 2)))
    assert torch.equal(layer.get_delta_weight('a'), kron)


def test_what_never_trains_is_loaded_and_stays_frozen(tiny_base: Path, tmp_path: Path) -> None:
    """A file may change the first text encoder's last layer; it is kept, saved again, and not trained."""
    pipeline = stock(tiny_base)
    from peft import LoraConfig, get_peft_model
    theirs = get_peft_model(pipeline.text_encoder, LoraConfig(r=2, target_modules=['q_proj'], init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path / 'text_encoder'))
    model = reread(tiny_base, tmp_path)
    adapter = model.adapters['a']
    assert len(adapter.all_parameters()) == 4 and len(adapter.trainables()) == 2
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(model.state_dict())
    adapter.save(tmp_path / 'again')
    assert len(load_file(tmp_path / 'again' / FILE)) == 4
    assert torch.equal(pictures(model), stock_pictures(pipeline))


def test_loading_in_place_wants_the_same_shape(tiny_base: Path, tmp_path: Path) -> None:
    """Another kind, rank, alpha or set of layers is refused in words, and nothing changes."""
    model = build(tiny_base, lora(alpha=8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for i, (config, words) in enumerate((
            (lora(kind='loha'), 'holds a LoHa; adapter .a. is a LoRA r4'), (lora(rank=2, alpha=4), 'of another rank'),
            (lora(alpha=4), r'alpha / rank = 1; adapter .a. by 2'), (lora(alpha=8, targets=['to_q']), 'missing'),
            (lora(alpha=8, targets=['to_q', 'to_k', 'to_v', 'to_out.0', 'ff.net.2']), 'unknown .*ff.net.2'))):
        build(tiny_base, config).adapters['a'].save(tmp_path / str(i))
        with pytest.raises(ValueError, match=words):
            model.adapters['a'].load(tmp_path / str(i))
        assert_same(model.state_dict(), before)
    # The same change written otherwise is the same: alpha / sqrt(rank) with rslora.
    build(tiny_base, lora(alpha=4, rslora=True)).adapters['a'].save(tmp_path / 'same')
    parameters = model.adapters['a'].all_parameters()
    model.adapters['a'].load(tmp_path / 'same')
    assert all(p is q for p, q in zip(parameters, model.adapters['a'].all_parameters(), strict=True))


def test_arguments_that_contradict_a_file(tiny_base: Path, tmp_path: Path) -> None:
    """Each is named with what the file has; the same values are taken, and scales apply."""
    config = lora(alpha=8, targets=['to_q', 'to_v'], blocks={'unet.mid_block': dict(rank=2)})
    build(tiny_base, config).adapters['a'].save(tmp_path)
    for settings, words in (
            (dict(kind='dora'), "kind='dora', but .* has 'lora'"), (dict(rank=8), 'rank of unet.*=8, but .* has 4'),
            (dict(alpha=4), 'alpha of .*=4, but .* has 8'), (dict(rslora=True), 'rslora=True, but .* has False'),
            (dict(parts=['unet', 'text_encoder']), r"parts=\('unet', 'text_encoder'\), but"),
            (dict(targets=['to_q']), 'differ in .* layers of unet'),
            (dict(blocks={'unet.mid_block': None}), 'leave out'),
            (dict(active_range=(0, 0.5), targets=['to_k']), 'differ in')):
        with pytest.raises(ValueError, match=words):
            reread(tiny_base, tmp_path, **settings)
    same = {**config, 'blocks': {'unet.mid_block': dict(rank=2, scale=0.5)}, 'scale': 2.0}
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=dict(same, weights=str(tmp_path))))
    scalings = {n.startswith('mid_block'): w.scaling['a'] for n, w in lora_layers.layers(model.unet, 'a').items()}
    assert scalings == {True: 2 * 0.5 * 8 / 2, False: 2 * 8 / 4}


class _Code:
    def __reduce__(self) -> Any:
        return print, ('code',)


def test_bad_files(tiny_base: Path, tmp_path: Path) -> None:
    """Another base, unknown keys, a kind within a kind, odd metadata, code in a pickle, nothing at all."""
    model = build(tiny_base, lora(parts=ALL))
    model.adapters['a'].save(tmp_path / 'a')
    state = load_file(tmp_path / 'a' / FILE)
    wide = write_tiny_sdxl(tmp_path / 'wide', channels=(16, 32, 48))
    with pytest.raises(ValueError, match=r"for another base: it changes 'unet\.\S+' from 64 to 64 .* from 48 to 48"):
        reread(wide, tmp_path / 'a')
    key = min(state)
    many = {f'unet.nothing.{i}.lora_A.weight': torch.zeros(4, 4) for i in range(12)}
    short = {k: (v[:2] if k == key else v) for k, v in state.items()}
    for i, (changed, header, words) in enumerate((
            (state | many, {}, r'12 unknown \((unet\.nothing\.\d+\.lora_A\.weight,? ){10}\.\.\.\)'),
            (state | {'unet.mid_block.attentions.0.proj_in.hada_w1_a': torch.zeros(4, 4)}, {}, 'hada_w1_a|lora_A'),
            ({'unet.mid_block.norm': torch.zeros(4)}, {}, '1 unknown'),
            (short, {}, r'do not fit each other: .*lora_A.weight \[2,'),
            ({k: v for k, v in state.items() if 'attn1.to_q' not in k}, None, r'missing \(\S*attn1.to_q.lora_A.weight'),
            (state, {'lora_adapter_metadata': '{'}, 'is not JSON'),
            (state, {'lora_adapter_metadata': '[]'}, 'is a list, not a dict'),
            (state, {'lora_adapter_metadata': json.dumps({'unet.r': 4, 'unet.lora_alpha': 4, 'unet.lora_bias': True})},
             'asks for lora_bias=True'))):
        path = tmp_path / f'{i}.safetensors'
        if header is None:
            from safetensors import safe_open
            with safe_open(tmp_path / 'a' / FILE, 'pt') as file:
                header = file.metadata()
        save_file(changed, path, metadata=header)
        with pytest.raises(ValueError, match=words):
            reread(tiny_base, path)
    torch.save({'unet.x': _Code()}, tmp_path / 'code.bin')
    torch.save({'state': {'unet.x': torch.zeros(1)}}, tmp_path / 'nested.bin')
    for name, words in (('code.bin', 'is a pickle that would run code'),
                        ('nested.bin', 'more than named tensors'), ('nothing.bin', 'no file or folder'),
                        ('wide', 'holds no weight file')):
        with pytest.raises(ValueError, match=words):
            reread(tiny_base, tmp_path / name)
    (tmp_path / 'ia3').mkdir()
    save_file(state, tmp_path / 'ia3' / 'adapter_model.safetensors')
    (tmp_path / 'ia3' / 'adapter_config.json').write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="peft_type='IA3' is unknown; choose one of 'LORA', 'LOHA', 'LOKR', 'OFT'"):
        reread(tiny_base, tmp_path / 'ia3')


def test_a_refused_adapter_leaves_the_base_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    """Nothing is half attached."""
    model = SDXL(pretrained=str(tiny_base), adapters=dict(a=lora()))
    shaken(model).adapters['a'].save(tmp_path)
    before = str(model.unet)
    other = type(model.adapters['a'])(weights=str(tmp_path), rank=9)
    other.name = 'b'
    with pytest.raises(ValueError, match='rank of unet'):
        other.attach(model)
    assert str(model.unet) == before
