"""The finished export on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class PushToHubHook(Hook):
    """Uploads `step<N>/` of the last step when training has ended.

    Args:
        repo_id: 'owner/name'; None makes it the work_dir's name, under the account of the token.
        token: of the hub; None takes the one that `hf auth login` stored. A token in a config ends up in files: better None.
        private: make the repository private, if it is new.
    """

    priority = 'VERY_LOW'

    def __init__(self, repo_id: str | None = None, token: str | None = None, private: bool = False) -> None:
        self.repo_id, self.token, self.private = repo_id, token, private

    @master_only
    def after_run(self, runner: Any) -> None:
        """Upload.

        Raises:
            ValueError: the hub said no or could not be reached; the export stays where it is.
        """
        from huggingface_hub import create_repo, upload_folder
        folder = Path(runner.work_dir) / f'step{runner.max_iters}'
        try:
            repo_id = create_repo(self.repo_id or Path(runner.work_dir).name, token=self.token, private=self.private,
                                  exist_ok=True).repo_id
            upload_folder(repo_id=repo_id, folder_path=str(folder), token=self.token,
                          commit_message=f'step {runner.max_iters}')
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"'{folder}' could not be uploaded to the hub: {first} It stays where it is; upload it "
                             f'with: hf upload {self.repo_id or "OWNER/NAME"} {folder}') from error
        runner.logger.info(f"Uploaded '{folder}' to {repo_id}.")
