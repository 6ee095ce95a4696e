"""Loading by hub id, as in users' configs, from a local hub that the real huggingface_hub talks to.

HF_ENDPOINT is read when huggingface_hub is imported, so the functions `in_...` run in processes of their own. Each does
many things, as its imports take seconds; its assertions fail the test.
"""

import contextlib
import io
import os
import runpy
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import ROOT, Hub, fetched, process, serve

from diffengine_sdxl.errors import UserError

UNET = 'unet/diffusion_pytorch_model.safetensors'
#: The files that a base needs.
BASE = {'model_index.json', 'scheduler/scheduler_config.json', UNET, 'vae/diffusion_pytorch_model.safetensors',
        'text_encoder/model.safetensors', 'text_encoder_2/model.safetensors',
        *(f'{part}/config.json' for part in ('unet', 'vae', 'text_encoder', 'text_encoder_2')),
        *(f'tokenizer{n}/{name}.json' for n in ('', '_2') for name in ('tokenizer', 'tokenizer_config'))}


# The hub's content: work/served/<name>/<revision>/

@pytest.fixture(scope='module')
def work(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the processes share."""
    folder = tmp_path_factory.mktemp('hub')
    write_bases(folder / 'served', tiny_base)
    write_adapters(folder / 'served', tiny_base)
    return folder


def write_bases(me: Path, base: Path) -> None:
    """Write a base with other usual files, at three revisions; a refiner, a VAE, a single file."""
    import original_format
    import torch
    from parity import stock

    from diffengine_sdxl.testing import tiny_vae, write_tiny_refiner, write_tiny_sdxl
    main = shutil.copytree(base, me / 'tiny' / 'main')
    half = write_tiny_sdxl(me / 'half', seed=3)
    stock(half).to(dtype=torch.float16).save_pretrained(main, variant='fp16')
    shutil.rmtree(half)
    shutil.copytree(base, main, dirs_exist_ok=True)
    for name in ('x.safetensors', 'x.ckpt', 'unet/diffusion_pytorch_model.bin', 'unet/flax_model.msgpack', 'README.md',
                 'text_encoder/pytorch_model.bin', 'vae/model.onnx', 'unet/diffusion_pytorch_model.non_ema.safetensors',
                 'vae_1_0/diffusion_pytorch_model.safetensors', 'tokenizer/x.bin'):
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_bytes(b'not needed' * 99)
    for seed, revision in enumerate(('v2', 'v1.0'), start=1):
        write_tiny_sdxl(me / 'tiny' / revision, seed=seed)
    sharded = write_tiny_sdxl(me / 'sharded' / 'main', seed=6)
    net = stock(sharded).unet
    (sharded / UNET).unlink()
    net.save_pretrained(sharded / 'unet', max_shard_size='2MB')
    write_tiny_refiner(me / 'refiner' / 'main')
    tiny_vae(3).save_pretrained(me / 'vae' / 'main')
    other = write_tiny_sdxl(me / 'other' / 'main', seed=4)
    (me / 'single' / 'main' / 'sub').mkdir(parents=True)
    original_format.write(me / 'single' / 'main' / 'sub' / 'x.safetensors', original_format.original_tensors(other))


def write_adapters(me: Path, base: Path) -> None:
    """Write one adapter of each kind as `save` does, and in the layouts that users upload."""
    import torch
    from kinds import CASES, build, shaken
    from safetensors.torch import load_file, save_file
    for kind in ('t2i_adapter', 'controlnet', 'ip_adapter', 'lora', 'dora_everywhere', 'textual_inversion'):
        adapter = shaken(build(base, dict(a=CASES[kind].config)), CASES[kind]).adapters['a']
        adapter.save(me / kind / 'main')
    lora, word = me / 'lora' / 'main' / 'pytorch_lora_weights.safetensors', me / 'textual_inversion' / 'main'
    (me / 'styles' / 'main' / 'old').mkdir(parents=True)
    for factor, name in enumerate(('x.safetensors', 'z.safetensors', 'old/x.safetensors'), start=2):
        save_file({key: factor * value for key, value in load_file(lora).items()}, me / 'styles' / 'main' / name)
    (me / 'one' / 'main').mkdir(parents=True)
    shutil.copy(lora, me / 'one' / 'main' / 'any name [1].safetensors')
    (me / 'one' / 'main' / 'optimizer.bin').write_bytes(b'x')
    vectors = load_file(word / 'learned_embeds.safetensors')
    (me / 'pair' / 'main').mkdir(parents=True)
    for number, key in (('', 'clip_l'), ('_2', 'clip_g')):
        save_file({'<blue>': vectors[key]}, me / 'pair' / 'main' / f'learned_embeds{number}.safetensors')
    whole = me / 'IP-Adapter' / 'main'
    (whole / 'sdxl_models').mkdir(parents=True)
    shutil.move(me / 'ip_adapter' / 'main' / 'ip_adapter.safetensors',
                whole / 'sdxl_models' / 'ip-adapter_sdxl_vit-h.safetensors')
    shutil.copytree(base.parent / 'image_encoder', whole / 'models' / 'image_encoder')
    for name in ('sdxl_models/ip-adapter_sdxl_vit-h.bin', 'models/image_encoder/pytorch_model.bin', 'sdxl_models/y.bin',
                 'sdxl_models/image_encoder/model.safetensors'):
        (whole / name).parent.mkdir(exist_ok=True)
        (whole / name).write_bytes(b'not needed')
    shutil.copytree(me / 't2i_adapter' / 'main', me / 'inner' / 'main' / 'depth')
    for repo, name in (('pickles', 'diffusion_pytorch_model.bin'), ('others', 'net.ckpt')):
        folder = shutil.copytree(me / 't2i_adapter' / 'main', me / repo / 'main')
        torch.save(load_file(folder / 'diffusion_pytorch_model.safetensors'), folder / name)
        (folder / 'diffusion_pytorch_model.safetensors').unlink()


# Loading

def source_of(work: Path, of_hub: bool) -> Any:
    """Return a function: 'tiny' -> 'me/tiny', or the folder that the hub serves by that id."""
    return lambda name, revision='main': f'me/{name}' if of_hub else str(work / 'served' / name / revision)


def bases(work: Path, of_hub: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings of SDXL from ids, or the same from folders."""
    at = source_of(work, of_hub)
    yield 'main', dict(pretrained=at('tiny'))
    commit = work / 'commit'
    for revision in ('v2', 'v1.0', commit.read_text() if of_hub and commit.is_file() else 'v2'):
        named = dict(revision=revision) if of_hub else {}
        yield revision, dict(pretrained=at('tiny', revision), **named)
    yield 'variant', dict(pretrained=at('tiny'), variant='fp16')
    yield 'sharded', dict(pretrained=at('sharded'))
    yield 'vae', dict(pretrained=at('tiny'), vae=at('vae'))
    yield 'unet', dict(pretrained=at('tiny'), unet=at('sharded'))
    yield 'vae of a base', dict(pretrained=at('tiny'), vae=at('other'), tokenizer=at('other'))
    file = work / 'served' / 'single' / 'main' / 'sub' / 'x.safetensors'
    for link in ('https://huggingface.co/me/single/blob/main/sub/x.safetensors', 'me/single/sub/x.safetensors',
                 f'{os.environ.get("HF_ENDPOINT", "https://hf.co")}/me/single/resolve/main/sub/x.safetensors'):
        yield link, dict(pretrained=link if of_hub else str(file), config=str(work / 'served' / 'other' / 'main'))


def adapters(work: Path, of_hub: bool) -> dict[str, Any]:
    """Return one adapter of each kind, as in configs."""
    from kinds import CASES
    at = source_of(work, of_hub)
    styles = 'https://huggingface.co/me/styles/blob/main/'
    loras = {
        'lora': dict(weights=at('lora')), 'named': dict(weights=at('styles'), weight_name='x.safetensors'),
        'old': dict(weights=at('styles'), subfolder='old', revision='main'),
        'one': dict(weights=at('one') if of_hub else f'{at("one")}/any name [1].safetensors'),
        'linked': dict(weights=f'{styles if of_hub else at("styles") + "/"}z.safetensors'),
        'dora': dict(weights=at('dora_everywhere'))}
    configs = {name: dict(type='LoRA', **settings) for name, settings in loras.items()}
    configs['t2i'] = dict(CASES['t2i_adapter'].config, weights=at('t2i_adapter'))
    configs['pickled'] = dict(CASES['t2i_adapter'].config, weights=at('pickles'))
    configs['inner'] = dict(CASES['t2i_adapter'].config, weights=at('inner'), subfolder='depth')
    configs['controlnet'] = dict(CASES['controlnet'].config, weights=at('controlnet'))
    configs['word'] = dict(type='TextualInversion', token='circle', weights=at('textual_inversion'))
    configs['pair'] = dict(type='TextualInversion', token='<blue>', weights=at('pair'))
    configs['ip'] = dict(type='IPAdapter', condition_key='reference', weights=at('IP-Adapter'), subfolder='sdxl_models',
                       weight_name='ip-adapter_sdxl_vit-h.safetensors', image_encoder=at('IP-Adapter'),
                       image_encoder_subfolder='models/image_encoder')
    return {name: dict(settings, trainable=False) for name, settings in configs.items()}


def weights(model: Any) -> dict[str, Any]:
    """Return all weights of a model, with its adapters'."""
    parts = {name: getattr(model, name) for name in ('unet', 'vae', 'text_encoder', 'text_encoder_2')}
    tensors = {f'{name}.{k}': v for name, part in parts.items() if part is not None
               for k, v in part.state_dict().items()}
    return tensors | {f'{name}.{i}': value for name, adapter in model.adapters.items()
                      for i, value in enumerate(adapter.all_parameters())}


def assert_same(one: Any, other: Any, case: str) -> None:
    """Check that weights, tokenizers and settings are equal."""
    import torch
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and len(a) > 100, case
    assert [key for key in a if not torch.equal(a[key], b[key])] == [], case
    vocabularies = [[t and t.get_vocab() for t in (model.tokenizer, model.tokenizer_2)] for model in (one, other)]
    assert vocabularies[0] == vocabularies[1], case
    assert one.scheduler_config == other.scheduler_config and one.null_prompt == other.null_prompt, case


def load_all(work: Path) -> None:
    """Check that weights and images are bitwise the same from the hub, or its cache, and from folders."""
    import torch
    from kinds import images, sample

    from diffengine_sdxl.models.sdxl import SDXL
    for (case, of_hub), (_, of_folder) in zip(bases(work, True), bases(work, False), strict=True):
        assert_same(SDXL(**of_hub), SDXL(**of_folder), case)
    both = []
    for hub in (True, False):
        base = SDXL(pretrained=source_of(work, hub)('tiny'), adapters=adapters(work, hub))
        both.append((base, SDXL(pretrained=source_of(work, hub)('refiner'), base_model=base,
                                shared_components=['text_encoder_2', 'vae'])))
    (one, refiner), (other, refiner_of_folder) = both
    assert_same(one, other, 'adapters')
    assert_same(refiner, refiner_of_folder, 'refiner')
    conditions = {name: images(1, seed=i) for i, name in enumerate(('conditioning_image', 'reference'))}
    made = [sample(model, conditions, rows=[0], steps=1) for model in (one, other)]
    assert torch.equal(*made) and torch.isfinite(made[0]).all()


def in_first_time(work: Path) -> None:
    """Files are downloaded once, and only those that are needed; the cache gets the branch's ref."""
    hub = serve(work)
    from diffengine_sdxl.loading.hub import _LISTINGS
    from diffengine_sdxl.models.sdxl import SDXL
    SDXL(pretrained='me/tiny')
    log = hub.take_log()
    assert fetched(log, 'me/tiny') == sorted(BASE)
    assert sum(a.sent for a in log if a.kind != 'api') == sum(
        (work / 'served' / 'tiny' / 'main' / name).stat().st_size for name in BASE)
    assert sum(a.kind == 'api' for a in log) <= 2
    ref = work / 'home' / 'hub' / 'models--me--tiny' / 'refs' / 'main'
    assert ref.read_text() == hub.repos['me/tiny'].commit('main')
    _LISTINGS.clear()  # expired
    SDXL(pretrained='me/tiny')
    assert [a.kind for a in hub.take_log()] == ['api']
    (work / 'commit').write_text(str(hub.repos['me/tiny'].commit('v2')))
    load_all(work)
    log = hub.take_log()
    # The fp16 weights of `main`, and the files of other revisions that differ from `main`.
    weights = [name for name in BASE if name.endswith('.safetensors')]
    assert fetched(log, 'me/tiny') == sorted([*weights, *weights, *(w.replace('.s', '.fp16.s') for w in weights)])
    assert fetched(log, 'me/IP-Adapter') == sorted(['sdxl_models/ip-adapter_sdxl_vit-h.safetensors', *(
        f'models/image_encoder/{name}' for name in ('config.json', 'model.safetensors', 'preprocessor_config.json'))])
    assert not [name for name in fetched(log, 'me/refiner') if name.startswith(('vae', 'text_encoder'))]
    assert fetched(log, 'me/vae') == ['config.json', 'diffusion_pytorch_model.safetensors']
    assert fetched(log, 'me/other') == sorted(name for name in BASE if name.startswith(('vae/', 'tokenizer')))
    assert fetched(log, 'me/styles') == ['old/x.safetensors', 'x.safetensors', 'z.safetensors']
    assert fetched(log, 'me/one') == ['any name [1].safetensors']
    assert len(fetched(log, 'me/sharded')) > len(BASE) and len(fetched(log, 'me/dora_everywhere')) == 6


def in_offline(work: Path) -> None:
    """The same from the cache, without a server; what it lacks is reported."""
    load_all(work)
    from huggingface_hub import snapshot_download

    from diffengine_sdxl.adapters.formats.files import find
    from diffengine_sdxl.models.sdxl import SDXL
    # The cache's own folder, whose files are symlinks, is a valid source.
    assert find(snapshot_download('me/styles', allow_patterns=[]), weight_name='x.safetensors').is_file()
    for settings, words in ((dict(pretrained='me/tiny', vae='me/nothing'), "'me/nothing' is not a local file"),
                            (dict(pretrained='me/other'), 'in the cache, without network, lacks model_index.json; wi'),
                            (dict(pretrained='me/tiny', variant='bf16'), "no weights of variant 'bf16'"),
                            (dict(pretrained='me/single/y.safetensors'), "'y.safetensors' of 'me/single' cannot be")):
        with pytest.raises(UserError, match=words):
            SDXL(**settings)


def test_everything_from_the_hub_and_from_its_cache(work: Path) -> None:
    process(in_first_time, work)
    process(in_offline, work, HF_HUB_OFFLINE='1')


# The command

def command(work: Path, *options: str) -> tuple[int, str]:
    """Run tools/infer.py; return exit code and stderr."""
    config = work / 'infer.py'
    config.write_text("model = dict(type='SDXL', pretrained='me/tiny', sampler=dict(type='Sampler', scheduler=dict("
                      "type='EulerDiscreteScheduler'), num_inference_steps=1))\n"
                      "infer_cfg = dict(prompt='a', height=32, width=32)\n")
    said, sys.argv = io.StringIO(), ['infer.py', str(config), '--device', 'cpu', *options]
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / 'tools' / 'infer.py'), run_name='__main__')
    return int(left.value.code or 0), said.getvalue()


def fails(work: Path, words: str, *options: str) -> None:
    """Check that the command fails with one sentence that has these words in this order."""
    code, said = command(work, '--out', 'F', *options)
    lines = [line for line in said.splitlines() if line.startswith('error: ')]
    assert code == 1 and len(lines) == 1 and 'Traceback' not in said, said
    rest = lines[0]
    for word in words.split(' ... '):
        assert word in rest, (word, lines[0])
        rest = rest.partition(word)[2]
    assert not Path('F').exists()


def pictures_of_adapters(work: Path, hub: Hub) -> None:
    """An adapter from the hub gives the image of its file; gated repositories need a token."""
    from PIL import ImageChops
    from PIL.Image import open as opened
    sources = 'me/styles,weight_name=x.safetensors', 'served/styles/main/x.safetensors', ''
    for out, source in zip('ABC', sources, strict=True):
        assert command(work, '--out', out, *(['--adapter', f'style={source}'] if source else []))[0] == 0
    made = [opened(next((work / out).glob('0*.png'))).convert('RGB') for out in 'ABC']
    assert ImageChops.difference(*made[:2]).getbbox() is None and ImageChops.difference(*made[1:]).getbbox()
    hub.repos['me/controlnet'].gated = hub.repos['me/vae'].private = 'hf_key'
    vae = ['--cfg-options', 'model.vae=me/vae']
    fails(work, f"'me/controlnet' is gated: accept its terms at {os.environ['HF_ENDPOINT']}/me/controlnet ... "
          '`hf auth login` ... HF_TOKEN', '--adapter', 'x=me/controlnet,type=ControlNet')
    fails(work, "'me/vae' is not a local file or folder ... no such repository ... HF_TOKEN", *vae)
    hub.take_log()
    os.environ['HF_TOKEN'] = 'hf_key'
    assert command(work, '--out', 'D', *vae)[0] == 0
    log = [a for a in hub.take_log() if a.repo == 'me/vae']
    # The token is sent to the hub, not to its storage.
    assert {a.kind: a.token for a in log} == {'api': 'Bearer hf_key', 'file': 'Bearer hf_key', 'storage': None}
    del os.environ['HF_TOKEN']


def broken_connections(work: Path, hub: Hub) -> None:
    """A broken download resumes; one that fails for good is reported, and resumes with the next command."""
    import time

    from huggingface_hub import constants

    from diffengine_sdxl.models.sdxl import SDXL
    constants.DOWNLOAD_CHUNK_SIZE, sleep, time.sleep = 1000, time.sleep, lambda _: None
    name, size = 'sub/x.safetensors', (work / 'served' / 'single' / 'main' / 'sub' / 'x.safetensors').stat().st_size
    config = str(work / 'served' / 'other' / 'main')
    try:
        hub.cuts['x.safetensors'] = [50000, 70000]
        SDXL(pretrained=f'me/single/{name}', config=config)
        log = [a for a in hub.take_log() if a.kind == 'storage' and a.method == 'GET']
        assert [a.range for a in log] == [None, 'bytes=50000-', 'bytes=120000-'] and sum(a.sent for a in log) == size
        hub.cuts[UNET] = [9000] + [0] * 5
        fails(work, "'me/other' was not downloaded completely ... the same command downloads the others",
              '--cfg-options', 'model.pretrained=me/other')
        first = fetched(hub.take_log(), 'me/other')
        assert SDXL(pretrained='me/other').unet is not None
        assert sorted([*set(first) - {UNET}, *fetched(hub.take_log(), 'me/other')]) == sorted(BASE)
    finally:
        time.sleep = sleep


def in_command(work: Path) -> None:
    """The command line, its errors, and the upload of an export."""
    hub = serve(work)
    from diffengine_sdxl.adapters.formats.files import find
    pictures_of_adapters(work, hub)
    set_ = ['--cfg-options']
    fails(work, "'me/nothing' is not a local file or folder ... no such repository. Check the name", *set_,
          'model.pretrained=me/nothing')
    fails(work, "'../x' is not a valid revision of 'me/tiny'", *set_, 'model.revision=../x')
    fails(work, "'me/tiny' has no revision 'v3'. It has main, v2, v1.0", *set_, 'model.revision=v3')
    fails(work, "'me/tiny' has no revision 'a-b-c'. It has main, v2, v1.0", *set_, 'model.revision=a-b-c')
    fails(work, "no weights of variant 'fp61' ... Omit `variant`", *set_, 'model.variant=fp61')
    fails(work, "'me/styles' has no file 'xx.safetensors'. Did you mean ... 'x.safetensors'", '--adapter',
          'style=me/styles,weight_name=xx.safetensors')
    fails(work, "'me/styles' holds 2 weight files (x.safetensors, z.safetensors); name one with weight_name",
          '--adapter', 'style=me/styles')
    fails(work, "'me/single' has no file 'y.safetensors' ... 'sub/x.safetensors'", *set_,
          'model.pretrained=me/single/y.safetensors')
    fails(work, "'me/others' has no weights in safetensors ... it has net.ckpt ... not downloaded", '--adapter',
          'x=me/others,type=T2IAdapter')
    fails(work, "'me/styles' has no model_index.json", *set_, 'model.pretrained=me/styles')
    (work / 'style.safetensors').touch()
    for source in ('./styel.safetensors', 'styel.safetensors'):
        fails(work, "There is no file ... styel.safetensors'", '--adapter', f'style={source}')
        with pytest.raises(UserError, match=f"no file or folder '{source}'. Did you mean 'style.safetensors'?"):
            find(source)
    fails(work, "There is no file ... tnny'", *set_, 'model.pretrained=./tnny')
    fails(work, "is a page of the hub; give the repository's id, 'me/tiny'", *set_,
          'model.pretrained=https://huggingface.co/me/tiny/tree/main')
    assert not [a for a in hub.take_log() if a.what.endswith(('.bin', '.ckpt'))]
    broken_connections(work, hub)
    upload(work, hub)
    hub.stop()
    assert command(work, '--out', 'E')[0] == 0  # from the cache
    fails(work, "'me/refiner' is not a local file or folder ... cannot be downloaded from the hub: ... refused ... "
          'Check the name, the network', *set_, 'model.pretrained=me/refiner')


def upload(work: Path, hub: Hub) -> None:
    """Upload a run's last export; the hub's refusals come before the run, and a failed upload's command repeats it."""
    import logging

    from diffengine_sdxl.engine.hooks.hub import PushToHubHook
    run = types.SimpleNamespace(work_dir=str(work / 'run'), max_iters=4, logger=logging.getLogger('uploads'))
    folder = shutil.copytree(work / 'served' / 'dora_everywhere' / 'main', work / 'run' / 'step4')
    with pytest.raises(UserError, match='nobody is logged in'):
        PushToHubHook().before_run(run)
    os.environ['HF_TOKEN'] = 'hf_key'
    hub.read_only.add('you/closed')
    with pytest.raises(UserError, match="the hub does not let you write to 'you/closed': Forbidden"):
        PushToHubHook('you/closed').before_run(run)
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    for repo_id, repo in (('you/it', 'you/it'), (True, 'me/run')):
        hook = PushToHubHook(repo_id)
        hook.before_run(run)
        hook.after_run(run)
        assert {name: sent for name, sent in hub.uploads[repo].items() if name != '.gitattributes'} == files
    repeated_by_hand(hub, run, folder, files)
    del os.environ['HF_TOKEN']


def repeated_by_hand(hub: Hub, run: Any, folder: Path, files: dict[str, bytes]) -> None:
    """An upload fails; the command that the warning names does the same."""
    from diffengine_sdxl.engine.hooks.hub import PushToHubHook
    hook = PushToHubHook('you/again')
    hook.before_run(run)
    hook.repo_id = 'you/gone'  # deleted meanwhile
    warnings: list[str] = []
    run.logger = types.SimpleNamespace(warning=warnings.append)
    hook.after_run(run)
    name, *arguments = shlex.split(warnings[0].partition('Upload it with: ')[2])
    assert name == 'hf' and arguments == ['upload', 'you/gone', str(folder)]
    from huggingface_hub.cli.hf import app
    app(arguments, standalone_mode=False)
    assert {name: sent for name, sent in hub.uploads['you/gone'].items() if name != '.gitattributes'} == files


def test_errors_of_the_command_are_one_sentence(work: Path) -> None:
    process(in_command, work, HF_HOME=str(work / 'home 2'))
