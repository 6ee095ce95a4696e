"""Weight files as such: finite, floating, honest about their scale; and what is left out or refused by name."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffengine_sdxl.adapters import lora_layers
from diffengine_sdxl.adapters.formats import files
from diffengine_sdxl.adapters.formats.detect import adapter_settings
from diffengine_sdxl.adapters.formats.lora import read_lora
from diffengine_sdxl.adapters.formats.textual_inversion import read_textual_inversion
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading import weights as loading_weights
from diffengine_sdxl.models.sdxl import SDXL
from diffengine_sdxl.registry import ADAPTERS

QUERY, ENCODER = 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q', 'encoder.layers.0.self_attn'
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@contextmanager
def attached(model: SDXL, **config: Any) -> Iterator[Any]:
    """An adapter on the model, for a while."""
    adapter = ADAPTERS.build(dict(trainable=False, **config))
    adapter.name = 'a'
    adapter.attach(model)
    try:
        yield adapter
    finally:
        adapter.detach(model)


def parts(model: SDXL) -> dict[str, Any]:
    return {part: lora_layers.plain(getattr(model, part)) for part in ('unet', 'text_encoder', 'text_encoder_2')}


def factors(layer: Any, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A and B of a layer, of numbers that fp8 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-8, 9, shape, generator=generator) / 16 for shape in (
        (rank, layer.in_features), (layer.out_features, rank)))  # type: ignore[return-value]


def change(model: SDXL, part: str, name: str, **config: Any) -> Tensor:
    """What an adapter adds to the output of a layer for the identity: its change of W, transposed, and of the bias."""
    plain = parts(model)[part][name]
    x = torch.cat([torch.eye(plain.in_features), torch.zeros(1, plain.in_features)]).to(plain.weight.dtype)
    before = plain(x)
    with attached(model, type='LoRA', **config) as adapter:
        after = adapter._wrappers[part][name](x)
    return (after - before).detach()


def lora_file(path: Path, model: SDXL, part: str = 'unet', key: str = f'unet.{QUERY}', name: str = QUERY,
              metadata: Mapping[str, Any] | None = None, **extra: Tensor) -> tuple[Tensor, Tensor]:
    """Write a LoRA of one layer; `extra` replaces or adds tensors."""
    a, b = factors(parts(model)[part][name])
    tensors = {'lora_A.weight': a, 'lora_B.weight': b, **extra}
    header = {'format': 'pt'} | ({'lora_adapter_metadata': json.dumps(metadata)} if metadata is not None else {})
    save_file({f'{key}.{k}': v.contiguous() for k, v in tensors.items()}, path, metadata=header)
    return a, b


def peft_folder(folder: Path, model: SDXL, **config: Any) -> tuple[Tensor, Tensor]:
    folder.mkdir(exist_ok=True)
    (folder / 'adapter_config.json').write_text(json.dumps(
        {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8, 'target_modules': [QUERY], **config}))
    return lora_file(folder / 'adapter_model.safetensors', model, key=f'base_model.model.{QUERY}')


def wrong_values() -> dict[str, tuple[Tensor, str]]:
    ones = torch.ones(4, 64)
    holes = ones.clone()
    holes[3, 5] = float('nan')
    return {'nan': (holes, '1 tensors hold NaN or infinite .*lora_A.weight'),
            'inf': (ones * float('inf'), '1 tensors hold NaN or infinite'),
            'nan in fp8': (holes.to(FP8[0]), '1 tensors hold NaN'), 'inf in bf16': (-ones.bfloat16() / 0, 'infinite'),
            'int8': (ones.to(torch.int8), r'1 of int8 \(\S*lora_A.weight\)'), 'bool': (ones.bool(), '1 of bool'),
            'complex': (ones.to(torch.complex64), '1 of complex64'), 'int64': (ones.long(), '1 of int64')}


@pytest.mark.parametrize('case', wrong_values())
@pytest.mark.parametrize('suffix', ['.safetensors', '.bin'])
def test_values_that_are_no_weights(tmp_path: Path, case: str, suffix: str) -> None:
    """In every format, named with the file, the number of tensors and the first keys."""
    tensor, words = wrong_values()[case]
    state = {'unet.x.lora_A.weight': tensor, 'unet.x.lora_B.weight': torch.zeros(4, 4)}
    path = tmp_path / f'x{suffix}'
    save_file(state, path) if suffix == '.safetensors' else torch.save(state, path)
    with pytest.raises(UserError, match=rf"x{suffix}'.*{words}"):
        files.read(path)


def test_nested_and_named_buffers(tmp_path: Path) -> None:
    """A nested pickle is checked too; ids of tokens and positions, and a LoRA's alpha, may be whole numbers."""
    torch.save({'image_proj': {'a': torch.tensor([float('nan')])}, 'ip_adapter': {}}, tmp_path / 'x.bin')
    with pytest.raises(UserError, match=r'infinite numbers \(image_proj\.a\)'):
        files.read(tmp_path / 'x.bin')
    fine = {'string_to_token': {'*': torch.tensor(265)}, 'string_to_param': {'*': torch.ones(1, 4)},
            'x.alpha': torch.tensor(4), 'embeddings.position_ids': torch.arange(4)}
    torch.save(fine, tmp_path / 'y.pt')
    assert files.read(tmp_path / 'y.pt').tensors.keys() == fine.keys()
    torch.save({'x': torch.zeros(1).expand(10**9)}, tmp_path / 'z.pt')
    with pytest.raises(UserError, match='repeat fewer numbers'):
        files.read(tmp_path / 'z.pt')


@pytest.mark.parametrize('dtype', FP8)
def test_fp8_is_read_exactly(model: SDXL, tmp_path: Path, dtype: torch.dtype) -> None:
    """As diffusers', peft's and kohya's, in both formats of fp8."""
    a, b = factors(parts(model)['unet'][QUERY])
    for key, names in ((f'unet.{QUERY}', ('lora_A', 'lora_B')),
                       (f'lora_unet_{QUERY.replace(".", "_")}', ('lora_down', 'lora_up'))):
        path = tmp_path / 'x.safetensors'
        save_file({f'{key}.{name}.weight': t.to(dtype) for name, t in zip(names, (a, b), strict=True)}, path)
        got = change(model, 'unet', QUERY, weights=str(path))
        expected = (b.to(dtype).float() @ a.to(dtype).float()).T
        torch.testing.assert_close(got[:-1], expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_peft_without_its_config(model: SDXL, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its alpha is asked for, under any name of the file; given, it is right, with rslora too."""
    for name in ('style.safetensors', 'adapter_model.safetensors'):
        path = tmp_path / name
        a, b = lora_file(path, model, key=f'base_model.model.{QUERY}')
        with pytest.raises(UserError, match='LoRA of peft without its adapter_config.json, so its alpha is unknown'):
            change(model, 'unet', QUERY, weights=str(path))
        for settings, factor in ((dict(alpha=8), 2.0), (dict(alpha=6, rslora=True), 3.0)):
            got = change(model, 'unet', QUERY, weights=str(path), **settings)
            torch.testing.assert_close(got[:-1], factor * (b @ a).T, rtol=1e-5, atol=1e-5)
    a, b = lora_file(tmp_path / 'x.safetensors', model)
    torch.testing.assert_close(change(model, 'unet', QUERY, weights=str(tmp_path / 'x.safetensors'))[:-1], (b @ a).T)
    got = change(model, 'unet', QUERY, weights=str(tmp_path / 'x.safetensors'), alpha=8)
    torch.testing.assert_close(got[:-1], 2 * (b @ a).T)


@pytest.mark.parametrize('init', ['pissa', 'pissa_niter_16', 'olora', 'OLoRA', 'corda', 'loftq', 'lora_ga', 'new', 5,
                                  [1]])
@pytest.mark.parametrize('form', ['peft', 'diffusers'])
def test_what_was_taken_out_of_the_base(model: SDXL, tmp_path: Path, init: Any, form: str) -> None:
    """Inits of peft that change the base's weights are refused by name, wherever the file says so."""
    if form == 'peft':
        peft_folder(tmp_path, model, init_lora_weights=init)
    else:
        lora_file(tmp_path / 'x.safetensors', model,
                  metadata={'unet.r': 4, 'unet.lora_alpha': 4, 'unet.init_lora_weights': init})
    words = (f'initialized by .*{init}.*path_initial_model_for_weight_conversion' if init not in ('new', 5, [1])
             else 'of which it is not known whether it changes the base')
    with pytest.raises(UserError, match=words):
        read_lora(tmp_path if form == 'peft' else tmp_path / 'x.safetensors', parts(model))


@pytest.mark.parametrize('init', [True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica'])
def test_where_training_began_changes_nothing(model: SDXL, tmp_path: Path, init: Any) -> None:
    peft_folder(tmp_path, model, init_lora_weights=init)
    assert read_lora(tmp_path, parts(model)).parts['unet'].alpha == {QUERY: 8}


def test_a_pissa_that_peft_converted_is_right(model: SDXL, tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` writes a plain LoRA of twice the rank: peft's own way out."""
    import copy

    import peft
    net = copy.deepcopy(model.unet)
    weight = net.get_submodule(QUERY).weight.detach().clone()
    wrapped = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=4, target_modules=[QUERY],
                                                       init_lora_weights='pissa'))
    wrapped.peft_config['default'].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / 'first'))
    wrapped.peft_config['default'].init_lora_weights = 'pissa'
    layer = net.get_submodule(QUERY)
    with torch.no_grad():
        layer.lora_B['default'].weight.add_(0.1)
    changed = layer.base_layer.weight + layer.get_delta_weight('default')
    wrapped.save_pretrained(str(tmp_path / 'out'), path_initial_model_for_weight_conversion=str(tmp_path / 'first'))
    got = change(model, 'unet', QUERY, weights=str(tmp_path / 'out'))
    torch.testing.assert_close(got[:-1].T, (changed - weight).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('settings', 'words'), [
    (dict(lora_alpha=float('nan')), 'NaN, which is no number'), (dict(lora_alpha=float('inf')), 'lora_alpha=inf must'),
    (dict(lora_alpha='8'), "lora_alpha='8' must be a finite"), (dict(lora_alpha=None), 'lora_alpha=None'),
    (dict(lora_alpha=[8]), 'must be a finite number'), (dict(r=0), 'r=0 must be a whole number above 0'),
    (dict(r='4'), "r='4'"), (dict(r=True), 'r=True'), (dict(r=8), 'gives .* rank 8, and its tensors have 4'),
    (dict(alpha_pattern={'to_q': float('inf')}), 'no alpha'), (dict(rank_pattern=[4]), 'must map regular expressions'),
    (dict(target_modules=5), 'must be a list or'), (dict(lora_bias=True), 'asks for lora_bias=True'),
    (dict(use_qalora=True), 'use_qalora=True'), (dict(peft_type='IA3'), "peft_type='IA3' is unknown; choose"),
    (dict(peft_type=['LORA']), 'peft_type=.* is unknown')])
def test_settings_of_peft_that_are_no_settings(model: SDXL, tmp_path: Path, settings: dict[str, Any],
                                               words: str) -> None:
    """In adapter_config.json and, where it goes there, in a header's lora_adapter_metadata."""
    peft_folder(tmp_path, model, **settings)
    with pytest.raises(UserError, match=words):
        read_lora(tmp_path, parts(model))
    if 'peft_type' not in settings:
        config = {'r': 4, 'lora_alpha': 8, **settings}
        lora_file(tmp_path / 'y.safetensors', model, metadata={f'unet.{k}': v for k, v in config.items()})
        (tmp_path / 'adapter_config.json').unlink()
        with pytest.raises(UserError, match=words):
            read_lora(tmp_path / 'y.safetensors', parts(model))


def test_malformed_settings_end_quickly(model: SDXL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No JSON, a list, nested without end, or too large."""
    peft_folder(tmp_path, model)
    config = tmp_path / 'adapter_config.json'
    for text, words in (('{', 'cannot be read'), ('[]', 'must hold a JSON object'), ('[' * 10**6, 'nested too deeply'),
                        ('{"a": ' + '[' * 200 + ']' * 200 + '}', 'nested more than 50 deep'),
                        ('{"r": ' + '9' * 10**4 + '}', 'cannot be read')):
        config.write_text(text)
        with pytest.raises(UserError, match=words):
            read_lora(tmp_path, parts(model))
    monkeypatch.setattr('diffengine_sdxl.limits.CURRENT.json_bytes', 100)
    config.write_text(json.dumps({'x': 'y' * 200}))
    with pytest.raises(UserError, match=r'settings of up to 100 are read \(limits.json_bytes\)'):
        read_lora(tmp_path, parts(model))


def test_a_bias_of_lora_b(model: SDXL, tmp_path: Path) -> None:
    """peft's lora_bias: scaled with the rest; read from a peft folder and from diffusers' file, and written to both."""
    bias = torch.arange(parts(model)['unet'][QUERY].out_features) / 64
    path = tmp_path / 'x.safetensors'
    a, b = lora_file(path, model, metadata={'unet.r': 4, 'unet.lora_alpha': 8, 'unet.lora_bias': True},
                     **{'lora_B.bias': bias})
    got = change(model, 'unet', QUERY, weights=str(path), scale=0.5)
    torch.testing.assert_close(got, torch.cat([(b @ a).T, torch.zeros(1, len(bias))]) + bias, rtol=1e-5, atol=1e-5)
    with attached(model, type='LoRA', weights=str(path)) as adapter:
        adapter.save(tmp_path / 'diffusers')
        from diffengine_sdxl.adapters.formats import peft_lora
        peft_lora.write(tmp_path / 'peft', adapter.to_weights(), parts(model))
    for folder in ('diffusers', 'peft', 'peft/unet'):
        assert torch.equal(change(model, 'unet', QUERY, weights=str(tmp_path / folder), scale=0.5), got), folder
    import peft
    config = peft.PeftConfig.from_pretrained(str(tmp_path / 'peft' / 'unet'))
    assert config.lora_bias and config.lora_alpha == 8
    lora_file(path, model, **{'lora_B.bias': bias[:3]})
    with pytest.raises(UserError, match=r'lora_B.bias. is of shape \[3\]'):
        read_lora(path, parts(model))


@pytest.mark.parametrize('spelling', ['to_{}_lora.{}.weight', 'processor.to_{}_lora.{}.weight'])
def test_the_oldest_keys_of_text_encoders(model: SDXL, tmp_path: Path, spelling: str) -> None:
    """Processors of text encoders, as diffusers wrote them; `to_out` is out_proj."""
    path = tmp_path / 'x.safetensors'
    state, expected = {}, {}
    for number, name in enumerate(('q', 'k', 'v', 'out')):
        a, b = factors(parts(model)['text_encoder'][f'{ENCODER}.{name}_proj'], seed=number)
        for side, tensor in (('down', a), ('up', b)):
            state[f'text_encoder.text_model.{ENCODER}.{spelling.format(name, side)}'] = tensor
        expected[name] = (b @ a).T
    save_file(state, path)
    for name, value in expected.items():
        got = change(model, 'text_encoder', f'{ENCODER}.{name}_proj', weights=str(path))
        torch.testing.assert_close(got[:-1], value, rtol=1e-5, atol=1e-5)


def test_keys_that_are_left_out_on_purpose(model: SDXL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off by default; then said in the log, and a pattern that matches nothing is refused."""
    path = tmp_path / 'x.safetensors'
    lora_file(path, model, **{'odd.weight': torch.ones(2), 'lora_B.odd': torch.ones(2)})
    with pytest.raises(UserError, match='2 unknown .* Set ignore_keys to patterns'):
        read_lora(path, parts(model))
    logged: list[str] = []
    monkeypatch.setattr(loading_weights, 'print_log', lambda text, **_: logged.append(text))
    read_lora(path, parts(model), ignore_keys=['*.odd*'])
    assert '2 of 4 keys are left out by ignore_keys' in logged[0]
    with pytest.raises(UserError, match="ignore_keys: '\\*.ood' matches no key"):
        read_lora(path, parts(model), ignore_keys=['*.odd*', '*.ood'])
    with pytest.raises(UserError, match='must be a list of patterns'):
        files.read(path, ignore_keys='*.odd')


def zeros(path: Path, **shapes: tuple[int, ...]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize(('keys', 'words'), [
    ({'lllite_unet_input_blocks_4_1.conditioning1.0.weight': (1,)}, 'a ControlLLLite'),
    ({'image_proj.proj_in.weight': (8, 512), 'ip_adapter.1.to_k_ip.weight': (1,)}, 'InstantID'),
    ({'image_proj.proj.0.weight': (1,), 'ip_adapter.0.to_q_lora.down.weight': (1,)}, 'FaceID'),
    ({'id_adapter.mapping.weight': (1,)}, 'a PuLID'), ({'pulid_ca.0.weight': (1,)}, 'a PuLID'),
    ({'id_encoder.visual_projection.weight': (1,)}, 'a PhotoMaker'),
    ({'lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight': (1,)}, 'a Flux'),
    ({'transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight': (1,)}, 'a Flux'),
    ({'diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight': (1,)}, 'a Stable Diffusion 3'),
    ({'transformer.transformer_blocks.0.attn.to_q.lora_A.weight': (1,)}, 'a transformer model'),
    ({'base_model.model.x.to_q.ia3_l': (1,)}, 'an IA3'), ({'base_model.model.x.to_q.boft_R': (1,)}, 'a BOFT')])
def test_kinds_that_are_never_read(tmp_path: Path, keys: dict[str, tuple[int, ...]], words: str) -> None:
    """Refused by name, by detection and by each adapter's own loading."""
    path = zeros(tmp_path / 'x.safetensors', **keys)
    with pytest.raises(UserError, match=f"x.safetensors' is .*{words}.*support"):
        adapter_settings(str(path))
    if 'FaceID' not in words:
        with pytest.raises(UserError, match=words):
            files.read(path)


WIDTHS = {'text_encoder': 24, 'text_encoder_2': 40}


def test_a_word_of_one_text_encoder(model: SDXL, tmp_path: Path) -> None:
    """Named by its key, or known by its width; the other encoder reads the word as ordinary text."""
    for key, width, part in (('clip_l', 24, 'text_encoder'), ('clip_g', 40, 'text_encoder_2'),
                             ('<word>', 40, 'text_encoder_2')):
        vectors, _ = read_textual_inversion(zeros(tmp_path / 'x.safetensors', **{key: (2, width)}), WIDTHS)
        assert {k: tuple(v.shape) for k, v in vectors.items()} == {part: (2, width)}
    with pytest.raises(UserError, match='for another base: its vectors are 30 wide'):
        read_textual_inversion(zeros(tmp_path / 'x.safetensors', w=(1, 30)), WIDTHS)
    with pytest.raises(UserError, match='does not say which it is for'):
        read_textual_inversion(zeros(tmp_path / 'x.safetensors', w=(1, 768)),
                               {'text_encoder': 768, 'text_encoder_2': 9})
    path = tmp_path / 'one.safetensors'
    save_file({'clip_g': torch.ones(1, 32)}, path)
    with attached(model, type='TextualInversion', token='<w>', weights=str(path)) as adapter:
        assert [v is None for v in adapter.new_tokens()['<w>']] == [True, False]
        adapter.save(tmp_path / 'again')
    with (attached(model, type='TextualInversion', token='<w>') as adapter,
          pytest.raises(UserError, match=r'1 missing \(clip_l\)')):
        adapter.load(path)
    assert load_file(tmp_path / 'again' / 'learned_embeds.safetensors').keys() == {'clip_g'}


@pytest.mark.parametrize(('first', 'second'), [
    ('x', 'x_2'), ('x_te1', 'x_te2'), ('x-clip_l', 'x-clip_g'), ('x_l', 'x_g'), ('x_1', 'x_2'),
    ('x_text_encoder', 'x_text_encoder_2'), ('te1', 'te2')])
def test_a_word_in_two_files(tmp_path: Path, first: str, second: str) -> None:
    """Whichever of them is named; and by a list whatever their names, in fp8 too."""
    one, two = tmp_path / f'{first}.safetensors', tmp_path / f'{second}.safetensors'
    save_file({'w': torch.full((1, 32), 0.5).half()}, one)
    save_file({'w': torch.full((1, 32), 2.0).to(FP8[1])}, two)
    equal = {'text_encoder': 32, 'text_encoder_2': 32}
    for source in (one, two, [str(one), str(two)]):
        vectors, _ = read_textual_inversion(source, equal)
        assert [float(v[0, 0]) for v in vectors.values()] == [0.5, 2.0] and list(vectors) == list(equal)
    other = zeros(tmp_path / 'other.safetensors', clip_g=(1, 32))
    with pytest.raises(UserError, match='both hold vectors for text_encoder_2'):
        read_textual_inversion([str(other), str(other)], equal)
    torch.save({'string_to_param': {'*': torch.tensor([[float('nan')]])}}, tmp_path / 'n.pt')
    with pytest.raises(UserError, match='NaN'):
        read_textual_inversion(tmp_path / 'n.pt', equal)


class _Code:
    def __reduce__(self) -> Any:
        return print, ('code',)


def test_a_refused_pickle_repeats_no_advice(tmp_path: Path) -> None:
    """Neither for code, nor for a damaged file, nor for a compressed archive."""
    import zipfile
    torch.save({'a': _Code()}, tmp_path / 'a.bin')
    torch.save({'a': torch.ones(3)}, tmp_path / 'c.bin')
    (tmp_path / 'b.bin').write_bytes((tmp_path / 'c.bin').read_bytes()[:200])
    with zipfile.ZipFile(tmp_path / 'd.bin', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data.pkl', b'0' * 10**6)
    for name, words in (('a', 'would run code|holds more than'), ('b', 'truncated'), ('d', 'compressed archive')):
        with pytest.raises(UserError, match=words) as error:
            files.read(tmp_path / f'{name}.bin')
        assert not any(advice in str(error.value) for advice in ('weights_only', 'safe_globals', 'allowlist'))


def test_the_check_costs_little() -> None:
    """About a tenth of a second a GB: 64 MB in far less than reading them takes."""
    import time
    tensors = [(str(i), torch.zeros(2**22, dtype=torch.bfloat16)) for i in range(8)]
    start = time.process_time()
    loading_weights.check_finite(tensors, 'x')
    assert time.process_time() - start < 0.5


def test_nothing_is_passed_over(tmp_path: Path) -> None:
    """The last value of the last of many tensors, and a scalar."""
    for index in (-1, 0):
        tensors = {str(i): torch.zeros(1000) for i in range(50)} | {'s': torch.tensor(0.0)}
        key = 's' if index else '49'
        tensors[key].view(-1)[index] = -float('inf')
        with pytest.raises(UserError, match=rf'1 tensors hold NaN or infinite numbers \({key}\)'):
            loading_weights.check_finite(tensors.items(), 'x')
