"""Upload the final export to the Hugging Face hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl.engine.main_process import on_main_process
from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, first_line
from diffengine_sdxl.loading.hub import hub_errors
from diffengine_sdxl.registry import HOOKS

LOGIN = 'Log in with `hf auth login`, or set HF_TOKEN, which takes precedence'


@HOOKS.register_module()
class PushToHubHook(Hook):
    """Upload `step<N>/` of the last step when training has ended.

    The login and the repository, which is created if it does not exist, are checked before the first step. An upload
    that fails does not fail the finished training. The token is that of `hf auth login` or HF_TOKEN: one in a config
    would end up in files.

    Args:
        repo_id: 'owner/name'; None for the work_dir's name. Without an owner it is the token's account.
        private: make a new repository private.
    """

    priority = 'VERY_LOW'

    def __init__(self, repo_id: str | None = None, private: bool = True) -> None:
        self.repo_id, self.private = repo_id, private

    def before_run(self, runner: ExperimentRunner) -> None:
        """Create the repository, or check that the token may write to it; from now on `repo_id` has its owner.

        Raises:
            UserError: in every process: nobody is logged in, the hub refuses the token or the repository, or it cannot
                be reached.
        """
        self.repo_id = on_main_process(lambda: self._writable(self.repo_id or Path(runner.work_dir).name))

    def _writable(self, repo_id: str) -> str:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        # Not `whoami`: its rate limit would stop some of many runs that start together.
        if get_token() is None:
            raise UserError(f"PushToHubHook uploads to '{repo_id}', but nobody is logged in to the hub. {LOGIN}.")
        try:
            full_id: str = HfApi().create_repo(repo_id, private=self.private, exist_ok=True).repo_id
            HfApi().auth_check(full_id, write=True)
        except HFValidationError as error:
            raise UserError(f"PushToHubHook: repo_id='{repo_id}' is no name for a repository: {first_line(error)}"
                            ) from error
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
        """Upload the export; if that fails, warn with the command that repeats it."""
        from huggingface_hub import HfApi
        assert self.repo_id is not None, 'set in before_run'
        folder = Path(runner.work_dir) / f'step{runner.max_iters}'
        try:
            HfApi().upload_folder(repo_id=self.repo_id, folder_path=str(folder),
                                  commit_message=f'step {runner.max_iters}')
        except hub_errors() as error:
            runner.logger.warning(f"The training is finished, but '{folder}' could not be uploaded to the hub: "
                                  f'{_reason(error)} Upload it with: '
                                  f'{shlex.join(["hf", "upload", self.repo_id, str(folder)])}')
            return
        runner.logger.info(f"Uploaded '{folder}' to {self.repo_id}.")

    def describe(self, runner: ExperimentRunner) -> dict[str, str]:
        """Return a row of the table that opens a training."""
        return {'hub': f"step{runner.max_iters}/ to '{self.repo_id}' at the end"}


def _reason(error: Exception) -> str:
    """Return the hub's own words if it answered, else the first line of the error, as a sentence."""
    reason = (getattr(error, 'server_message', None) or first_line(error)).strip().rstrip('.')
    return f'{reason}.'
