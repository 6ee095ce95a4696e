"""Upload the final export to the Hugging Face hub."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl.engine import model_card
from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, first_line
from diffengine_sdxl.loading.hub import hub_errors
from diffengine_sdxl.registry import HOOKS

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

LOGIN = 'Log in with `hf auth login`, or set HF_TOKEN, which takes precedence'


@HOOKS.register_module()
class PushToHubHook(Hook):
    """Upload `step<N>/` of the last step, with its card, when training has ended: `push_to_hub = 'owner/name'`.

    The login and the repository, which is created if it does not exist, are checked before the first step. An upload
    that fails does not fail the finished training. The token is that of `hf auth login` or HF_TOKEN: one in a config
    would end up in files. In the uploaded manifest.json, paths are reduced to their last part.

    Args:
        repo_id: 'owner/name'; without an owner it is the token's account's. True for the work_dir's name; None to
            upload nothing.
        private: make a new repository private.
    """

    priority = 'VERY_LOW'

    def __init__(self, repo_id: str | bool | None = True, private: bool = True) -> None:
        if not isinstance(repo_id, str | bool | None):
            raise UserError(f"push_to_hub={repo_id!r} must be 'owner/name', or True for the work_dir's name.")
        self.wanted, self.private = repo_id, private
        #: With its owner; '' to upload nothing.
        self.repo_id = ''

    def before_run(self, runner: ExperimentRunner) -> None:
        """Create the repository, or check that the token may write to it, if there will be an upload.

        Raises:
            UserError: in every process: nobody is logged in, the hub refuses the token or the repository, or it cannot
                be reached.
        """
        if self.wanted:
            wanted = self.wanted if isinstance(self.wanted, str) else Path(runner.work_dir).name
            self.repo_id = on_main_process(lambda: self._writable(wanted))

    def _writable(self, repo_id: str) -> str:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.utils import validate_repo_id
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UserError(f"PushToHubHook: repo_id='{repo_id}' is no name for a repository: {first_line(error)}"
                            ) from error
        # Not `whoami`: its rate limit would stop some of many runs that start together.
        if get_token() is None:
            raise UserError(f"PushToHubHook uploads to '{repo_id}', but nobody is logged in to the hub. {LOGIN}.")
        try:
            full_id: str = HfApi().create_repo(repo_id, private=self.private, exist_ok=True).repo_id
            HfApi().auth_check(full_id, write=True)
        except HfHubHTTPError as error:
            raise UserError(f"PushToHubHook: the hub does not let you write to '{repo_id}': "
                            f'{_reason(error)} {LOGIN}; the token needs write access to that repository.') from error
        except hub_errors() as error:
            raise UserError(f"PushToHubHook uploads to '{repo_id}', but {constants.ENDPOINT} cannot be reached: "
                            f'{_reason(error)} Check the network and HF_HUB_OFFLINE, or remove the hook and upload '
                            'step<N>/ later with `hf upload`.') from error
        return full_id

    @master_only
    def after_run(self, runner: ExperimentRunner) -> None:
        """Write the card for the repository and upload the export; if that fails, warn with the command for it."""
        from huggingface_hub import HfApi
        if not self.repo_id:
            return
        folder = Path(runner.work_dir) / f'step{runner.max_iters}'
        model_card.update(runner, runner.max_iters, self.repo_id)
        try:
            HfApi().create_commit(self.repo_id, _files(folder), commit_message=f'step {runner.max_iters}')
        except hub_errors() as error:  # OSError among them: there is no export
            runner.logger.warning(f"The training is finished, but '{folder}' could not be uploaded to the hub: "
                                  f'{_reason(error)} Upload it with: '
                                  f'{shlex.join(["hf", "upload", self.repo_id, str(folder)])}')
            return
        runner.logger.info(f"Uploaded '{folder}' to {self.repo_id}.")

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training, if there will be an upload."""
        return {} if not self.repo_id else {'hub': f"step{runner.max_iters}/ to '{self.repo_id}' at the end"}


def _files(folder: Path) -> list[CommitOperationAdd]:
    """Return all files of an export as they are uploaded.

    Raises:
        OSError: there is no export.
    """
    from huggingface_hub import CommitOperationAdd
    files: dict[str, str | bytes] = {path.relative_to(folder).as_posix(): str(path) for path in sorted(
        folder.rglob('*')) if path.is_file() and not path.name.startswith('.')}
    if not files:
        raise FileNotFoundError(f"There is no export '{folder}'.")
    if 'manifest.json' in files:
        public = model_card.public_manifest(json.loads((folder / 'manifest.json').read_text()))
        files['manifest.json'] = f'{json.dumps(public, indent=1)}\n'.encode()
    return [CommitOperationAdd(name, content) for name, content in files.items()]


def _reason(error: Exception) -> str:
    """Return the hub's own words if it answered, else the first line of the error, as a sentence."""
    reason = (getattr(error, 'server_message', None) or first_line(error)).strip().rstrip('.')
    return f'{reason}.'
