"""PushToHubHook: what can be refused is refused before the first step; an upload that fails does not fail the run.

`HfApi` is replaced; the real one talks to a local hub in tests/loading/test_hub.py.
"""

import json
import multiprocessing
import shlex
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from runs import command, curves

from diffengine_sdxl.engine.hooks.hub import PushToHubHook
from diffengine_sdxl.errors import UserError
from diffengine_sdxl.loading.hub import hub_errors

ANYWHERE = types.SimpleNamespace(work_dir='/some/where/run')


class Api:
    """HfApi with a call that fails; `calls` are of all instances."""

    calls: list[tuple[str, str]] = []
    sent: dict[str, Any] = {}
    failing: str = ''
    error: Exception

    def _call(self, name: str, repo_id: str) -> None:
        Api.calls.append((name, repo_id))
        if name == Api.failing:
            raise Api.error

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self._call(f'create {"private" if private else "public"}', repo_id)
        return types.SimpleNamespace(repo_id=repo_id if '/' in repo_id else f'me/{repo_id}')

    def auth_check(self, repo_id: str, write: bool) -> None:
        assert write
        self._call('may write', repo_id)

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        Api.sent = {one.path_in_repo: one.path_or_fileobj for one in operations}
        self._call(f'upload {Path(Api.sent["README.md"]).parent}, {commit_message}', repo_id)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    """Replace HfApi, as for a user who is logged in."""
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    monkeypatch.setattr(Api, 'calls', [])
    monkeypatch.setattr(Api, 'failing', '')
    monkeypatch.setenv('HF_TOKEN', 'hf_key')
    return Api


def answer(status: int, message: str) -> HfHubHTTPError:
    """Return what HfApi raises if the hub refuses."""
    response: Any = types.SimpleNamespace(headers={}, request=None, status_code=status)
    return HfHubHTTPError(f"Client error '{status}' for url 'https://hf.co/api' (Request ID: 1)\n\n{message}",
                          response=response, server_message=message)


def hub(**settings: Any) -> dict[str, Any]:
    """Return options of a run of two steps that ends with an upload."""
    return {'train_cfg.max_iters': 2, 'push_to_hub': True, **settings}


def test_an_upload(api: type[Api], tmp_path: Path, tiny: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    """Of the last step, to a repository that was checked before; under the token's account if no owner is named."""
    assert command(tmp_path / 'run', {**tiny, **hub()}) == 0
    assert api.calls == [('create private', 'run'), ('may write', 'me/run'),
                         (f'upload {tmp_path}/run/step2, step 2', 'me/run')]
    console = capfd.readouterr().out
    assert "  hub          step2/ to 'me/run' at the end\n" in console
    assert f"Uploaded '{tmp_path}/run/step2' to me/run." in console
    sent, folder = Api.sent, tmp_path / 'run' / 'step2'
    assert sorted(sent) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())
    assert "T2IAdapter.from_pretrained('me/run', subfolder='adapter'" in (folder / 'README.md').read_text()
    kept, public = json.loads((folder / 'manifest.json').read_text()), json.loads(sent['manifest.json'])
    assert str(tmp_path) not in str(public) and str(tiny['model.pretrained']) in str(kept)
    assert public['base']['pretrained'] == Path(tiny['model.pretrained']).name and public['rows'] == kept['rows']


def test_without_a_repository_nothing_is_uploaded(api: type[Api]) -> None:
    hook = PushToHubHook(None)
    hook.before_run(ANYWHERE)
    hook.after_run(ANYWHERE)
    assert not api.calls and hook.describe(ANYWHERE) == {}
    with pytest.raises(UserError, match="push_to_hub=3 must be 'owner/name'"):
        PushToHubHook(3)


@pytest.mark.parametrize(('repo_id', 'private', 'calls'), [
    ('you/it', True, [('create private', 'you/it'), ('may write', 'you/it')]),
    ('it', False, [('create public', 'it'), ('may write', 'me/it')])])
def test_the_repository(repo_id: str, private: bool, calls: list[tuple[str, str]], api: type[Api]) -> None:
    hook = PushToHubHook(repo_id, private)
    hook.before_run(ANYWHERE)
    assert api.calls == calls and hook.repo_id == calls[-1][1]


def test_a_failed_upload_is_a_warning(api: type[Api], tmp_path: Path, tiny: dict[str, Any],
                                      capfd: pytest.CaptureFixture[str]) -> None:
    """The run has succeeded; the command that is named repeats the upload, also where the path needs quotes."""
    folder = tmp_path / 'my run'
    api.failing, api.error = f'upload {folder}/step2, step 2', answer(507, 'No space left.')
    assert command(folder, {**tiny, **hub(push_to_hub='you/it')}) == 0
    console = capfd.readouterr()
    warning, = (line for line in console.out.splitlines() if 'WARNING' in line)
    assert f"The training is finished, but '{folder}/step2' could not be uploaded" in warning
    assert 'No space left. Upload it with: ' in warning
    assert shlex.split(warning.partition('Upload it with: ')[2]) == ['hf', 'upload', 'you/it', f'{folder}/step2']
    assert 'Uploaded' not in console.out and not console.err and (folder / 'step2' / 'adapter').is_dir()


def test_a_refusal_costs_no_step(api: type[Api], tmp_path: Path, tiny: dict[str, Any],
                                 capfd: pytest.CaptureFixture[str]) -> None:
    api.failing, api.error = 'may write', answer(403, 'You need write access.')
    assert command(tmp_path, {**tiny, **hub(push_to_hub='you/it')}) == 1
    assert capfd.readouterr().err == (
        "error: PushToHubHook: the hub does not let you write to 'you/it': You need write access. Log in with `hf auth "
        'login`, or set HF_TOKEN, which takes precedence; the token needs write access to that repository.\n')
    assert not (tmp_path / 'curves.jsonl').exists() or not curves(tmp_path)


@pytest.mark.parametrize(('failing', 'error', 'words'), [
    ('create private', answer(401, 'Invalid token'), "does not let you write to 'a/b': Invalid token. Log in with"),
    ('create private', hub_errors()[0]('Name or service not known'),
     "uploads to 'a/b', but https?://.* cannot be reached: Name or service not known. Check the network"),
    ('may write', OfflineModeIsEnabled('Offline mode is enabled.'),
     'cannot be reached: Offline mode is enabled. Check the network and HF_HUB_OFFLINE, or remove the hook')])
def test_refusals(failing: str, error: Exception, words: str, api: type[Api]) -> None:
    api.failing, api.error = failing, error
    with pytest.raises(UserError, match=words):
        PushToHubHook('a/b').before_run(ANYWHERE)


def test_nobody_is_logged_in(api: type[Api], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, 'get_token', lambda: None)
    with pytest.raises(UserError, match="uploads to 'run', but nobody is logged in to the hub. Log in with `hf auth"):
        PushToHubHook().before_run(ANYWHERE)
    with pytest.raises(UserError, match="repo_id='x y' is no name for a repository: Repo id must"):
        PushToHubHook('x y').before_run(ANYWHERE)  # before anybody logs in for it
    assert not api.calls


@pytest.mark.parametrize(('failing', 'outcome'), [('', "'me/run' []"), ('may write', 'the hub does not let you')])
def test_in_two_processes_one_talks_to_the_hub(failing: str, outcome: str, api: type[Api], tmp_path: Path) -> None:
    """The other learns what it said, a refusal too, and does not wait for ever."""
    api.failing, api.error = failing, answer(403, 'No.')
    fork = multiprocessing.get_context('fork')
    processes = [fork.Process(target=in_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    main, other = ((tmp_path / f'{rank}').read_text() for rank in range(2))
    assert outcome in other and "[]" in other
    assert "('may write', 'me/run')" in main and outcome.partition(' [')[0] in main


def in_process(rank: int, folder: Path) -> None:
    """Run the check in a group of two; write the repository or the error, and the calls."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    hook = PushToHubHook()
    try:
        hook.before_run(ANYWHERE)
        said = repr(hook.repo_id)
    except UserError as error:
        said = str(error)
    (folder / f'{rank}').write_text(f'{said} {Api.calls}')
