"""Repositories that move, break off, lack files or are named by a link; see test_hub.py."""

import json
import logging
import shutil
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hub import Hub, fetched, process, serve

from diffengine_sdxl.errors import UserError

PIXELS = 'preprocessor_config.json'


@pytest.fixture(scope='module')
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """work/served/<name>/<revision>/: small files, image encoders and VAEs in the layouts that users upload."""
    import torch
    from safetensors.torch import load_file, save_file

    from diffengine_sdxl.testing import tiny_vae, write_tiny_image_encoder
    work = tmp_path_factory.mktemp('hub_parts')
    me = work / 'served'
    for revision in ('main', 'next', 'third'):
        (me / 'moving' / revision).mkdir(parents=True)
        for name in ('x.json', 'y.json'):
            (me / 'moving' / revision / name).write_text(f'"{revision}"')
    (me / 'styles' / 'main').mkdir(parents=True)
    for name in ('pytorch_lora_weights', 'other'):
        save_file({'a': torch.zeros(1)}, me / 'styles' / 'main' / f'{name}.safetensors')
    encoder = me / 'encoder'
    write_tiny_image_encoder(encoder / 'main')
    settings = json.loads((encoder / 'main' / PIXELS).read_text())
    (encoder / 'main' / PIXELS).unlink()
    (encoder / 'main' / 'feature_extractor').mkdir()
    (encoder / 'main' / 'feature_extractor' / PIXELS).write_text(json.dumps({**settings, 'image_mean': [0.25] * 3}))
    tensors = load_file(encoder / 'main' / 'model.safetensors')
    pull = me / 'pull' / 'main' / 'sub'
    shutil.copytree(encoder / 'main', pull)
    (pull / 'model.safetensors').unlink()
    save_file({key: -value for key, value in tensors.items()}, pull / 'model.fp16.safetensors', {'format': 'pt'})
    shutil.copytree(encoder / 'main', encoder / 'v2')
    twice = {key: 2 * value for key, value in tensors.items()}
    save_file(twice, encoder / 'v2' / 'model.safetensors', {'format': 'pt'})
    shutil.copytree(encoder / 'main', me / 'encoder_bin' / 'main')
    shard(me / 'encoder_bin' / 'main', 'model.safetensors', 'pytorch_model')
    vae = tiny_vae(3)
    for name, variants in (('vae_half', ('fp16',)), ('vae_two', ('fp16', 'bf16')), ('vae_bin', ())):
        folder = me / name / 'main' / 'vae'
        vae.save_pretrained(folder, **({'variant': variants[0]} if variants else {}))
        for variant in variants[1:]:
            vae.save_pretrained(folder, variant=variant)
    shard(me / 'vae_bin' / 'main' / 'vae', 'diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model')
    save_file({'a': torch.zeros(1)}, me / 'vae_bin' / 'main' / 'vae' / 'style.safetensors')
    return work


def shard(folder: Path, name: str, stem: str) -> None:
    """Replace a safetensors file by two pickles of tensors and their index."""
    import torch
    from safetensors.torch import load_file
    tensors = load_file(folder / name)
    (folder / name).unlink()
    index: dict[str, str] = {}
    for number, keys in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        part = f'{stem}-{number:05d}-of-00002.bin'
        torch.save({key: tensors[key] for key in keys}, folder / part)
        index |= dict.fromkeys(keys, part)
    size = sum(value.nbytes for value in tensors.values())
    (folder / f'{stem}.bin.index.json').write_text(json.dumps({'metadata': {'total_size': size}, 'weight_map': index}))


def expire_listings() -> None:
    from diffengine_sdxl.loading import hub
    hub._LISTINGS.clear()


def one_commit(work: Path, server: Hub) -> None:
    """All files are of the commit that was listed, and that commit is reported, whatever moves or breaks."""
    from diffengine_sdxl.loading import hub
    folders = {name: work / 'served' / 'moving' / name for name in ('main', 'next', 'third')}
    repo = hub.Repo('me/moving')
    old, first = str(server.repos['me/moving'].commit('main')), repo.fetch(['x.json'])
    server.add('me/moving', folders['next'])
    # Listed before the move: the other file is of the same commit.
    assert repo.fetch(['y.json']) == first and (first / 'y.json').read_text() == '"main"' and first.name == old
    assert hub.commit_in_cache('me/moving') == old
    expire_listings()
    server.down = {'tree'}
    with pytest.raises(UserError, match="'me/moving' was not downloaded completely"):
        hub.Repo('me/moving').fetch(['x.json'])
    assert hub.commit_in_cache('me/moving') == old
    # Another function downloaded a part of the commit: its folder exists without the other file.
    new = hub.fetch_file('me/moving', 'x.json').parent.name
    assert new != old and hub.commit_in_cache('me/moving') == new
    expire_listings()
    with pytest.raises(UserError, match='was not downloaded completely: y.json are missing'):
        hub.Repo('me/moving').fetch(['x.json', 'y.json'])
    server.down = set()
    assert (hub.Repo('me/moving').fetch(['y.json']) / 'y.json').read_text() == '"next"'
    # Another process moves the branch before provenance asks what was loaded here.
    ref = first.parents[1] / 'refs' / 'main'
    assert ref.read_text() == new
    ref.write_text(old)
    assert hub.commit_in_cache('me/moving') == new
    server.down = {'revision'}
    expire_listings()
    assert (hub.Repo('me/moving').fetch(['y.json']) / 'y.json').read_text() == '"main"'
    assert hub.commit_in_cache('me/moving') == old  # what was loaded
    server.down = set()


def listed_once(server: Hub) -> None:
    """Looking for a file in two ways costs one listing, until it expires."""
    from diffengine_sdxl.adapters.formats import files
    server.take_log()
    for listings in (1, 1):
        files.parts_folder('me/styles', ('adapter_config.json',), None, None)
        assert files.find('me/styles', ('none.safetensors',), weight_name='other.safetensors').is_file()
        log = server.take_log()
        assert [a.what for a in log if a.kind == 'api'].count('revision') == listings
        expire_listings()
    assert len([a for a in log if a.kind == 'api']) == 1 and fetched(log, 'me/styles') == []


def encoders(work: Path, server: Hub) -> None:
    """Image encoders with their preprocessing, at revisions, in variants, by links and in pickles."""
    import torch
    from transformers import CLIPVisionModelWithProjection

    from diffengine_sdxl.adapters.frozen_image_encoder import load_encoder
    from diffengine_sdxl.adapters.image_encoder import ImageEncoder
    from diffengine_sdxl.loading.strict import load_pretrained
    server.repos['me/pull'].folders['refs/pr/1'] = server.repos['me/pull'].folders.pop('main')
    server.add('me/pull', server.repos['me/pull'].folders['refs/pr/1'], 'refs/pr/1')
    plain = CLIPVisionModelWithProjection.from_pretrained(work / 'served' / 'encoder' / 'main')

    def same(net: Any, factor: int) -> None:
        assert all(torch.equal(value, factor * net.state_dict()[key]) for key, value in plain.state_dict().items())
    for source in ('me/encoder', str(work / 'served' / 'encoder' / 'main')):
        found = load_encoder(source, None, torch.float32)
        assert found.preprocessing.mean == (0.25,) * 3
        same(found.net, 1)
    for revision in ('refs/pr/1', 'refs%2Fpr%2F1'):
        link = f'https://huggingface.co/me/pull/blob/{revision}/sub/model.fp16.safetensors'
        same(load_encoder(link, None, torch.float32).net, -1)
        same(load_pretrained(CLIPVisionModelWithProjection, link), -1)
    same(load_pretrained(CLIPVisionModelWithProjection, 'https://hf.co/me/encoder/resolve/v2/config.json'), 1 / 2)
    same(load_pretrained(CLIPVisionModelWithProjection, 'me/encoder_bin'), 1)
    for load in (lambda link: load_encoder(link, None, torch.float32), lambda link: load_pretrained(type(plain), link)):
        with pytest.raises(UserError, match="links to a file .* give the repository's id, 'me/styles'"):
            load('https://huggingface.co/me/styles/blob/main/other.safetensors')
    base = types.SimpleNamespace(config=types.SimpleNamespace(projection_dim=plain.config.projection_dim))
    adapter = ImageEncoder(weights='me/encoder', revision='v2')
    adapter.attach(types.SimpleNamespace(text_encoder_2=base))
    same(adapter.net, 1 / 2)


def vaes(work: Path) -> None:
    """Another VAE in one variant only, in sharded pickles beside an unrelated file, or in two variants."""
    import torch
    from diffusers import AutoencoderKL

    from diffengine_sdxl.loading import base as loading
    messages: list[str] = []
    handler = types.SimpleNamespace(level=0, handle=lambda record: messages.append(record.getMessage()))
    logging.getLogger('diffusers').addHandler(handler)  # type: ignore[arg-type]
    served = work / 'served'
    expected = AutoencoderKL.from_pretrained(served / 'vae_half' / 'main' / 'vae', variant='fp16').state_dict()

    def load(source: str, variant: str | None = None) -> Any:
        return loading._load_other('vae', source, None, torch.float32, None, variant).state_dict()
    for source in ('vae_half', 'vae_bin'):
        for place in (f'me/{source}', str(served / source / 'main')):
            assert all(torch.equal(value, expected[key]) for key, value in load(place).items()), place
    assert not [line for line in messages if 'rror' in line], messages
    for place in ('me/vae_two', str(served / 'vae_two' / 'main')):
        assert load(place, 'bf16').keys() == expected.keys()
        with pytest.raises(UserError, match=f"variants bf16, fp16 only; .* '{place}/vae/diffusion_pytorch_model.bf"):
            load(place)
    for place in ('me/vae_half', str(served / 'vae_half' / 'main')):
        with pytest.raises(UserError, match=f"'{place}' has no folder 'tokenizer'. `tokenizer` takes"):
            loading._tokenizer_folder(place, None)


def local_names(work: Path) -> None:
    """A name that cannot be read is reported; of a large folder, not all names are compared."""
    from diffengine_sdxl.loading import hub
    for name in ('x' * 5000, '~nobody-there/x'):
        with pytest.raises(UserError, match="' cannot be read: (File name too long|Could not)") as error:
            hub.local_path(name)
        assert len(str(error.value)) < 400
    assert hub.suggest_sibling(Path('x' * 5000) / 'a') == '' and "'served'" in hub.suggest_sibling(work / 'servd')
    maximum, hub.MAX_SIBLINGS = hub.MAX_SIBLINGS, 0
    assert hub.suggest_sibling(work / 'servd') == ''
    hub.MAX_SIBLINGS = maximum


def in_online(work: Path) -> None:
    """With the hub."""
    server = serve(work)
    sleep, time.sleep = time.sleep, lambda _: None  # between huggingface_hub's attempts
    one_commit(work, server)
    time.sleep = sleep
    listed_once(server)
    encoders(work, server)
    vaes(work)
    local_names(work)


def in_offline(work: Path) -> None:
    """The cache's files are not mistaken for the whole repository, with or without a recorded listing."""
    import torch

    from diffengine_sdxl.adapters.formats import files
    from diffengine_sdxl.adapters.formats.lora import NAMES
    from diffengine_sdxl.adapters.frozen_image_encoder import load_encoder

    def refused(source: str, words: str, names: Sequence[str] = ()) -> None:
        with pytest.raises(UserError, match=words):
            files.find(source, names)
        assert files.find(source, names, weight_name='other.safetensors').is_file()
    store = work / 'home' / 'hub'
    refused('me/styles', 'lacks pytorch_lora_weights.safetensors; with network', NAMES)
    refused('me/styles', 'holds 2 weight files')
    # As earlier versions of huggingface_hub leave it.
    shutil.copytree(store / 'models--me--styles', store / 'models--me--unknown', ignore=lambda *_: ['trees'])
    refused('me/unknown', 'may be a part of the repository only .* weight_name', NAMES)
    assert load_encoder('me/encoder', None, torch.float32).preprocessing.mean == (0.25,) * 3
    for path in (store / 'models--me--encoder').glob(f'snapshots/*/feature_extractor/{PIXELS}'):
        path.unlink()
    with pytest.raises(UserError, match=f'lacks feature_extractor/{PIXELS}'):
        load_encoder('me/encoder', None, torch.float32)


def test_files_of_a_repository(work: Path) -> None:
    process(in_online, work)
    process(in_offline, work, HF_HUB_OFFLINE='1')
