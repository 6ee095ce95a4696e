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

    The token is that of `hf auth login` or of the variable HF_TOKEN: one in a config would end up in files.

    Args:
        repo_id: 'owner/name'; None makes it the work_dir's name, under the account of the token.
        private: make the repository private, if it is new.
    """

    priority = 'VERY_LOW'

    def __init__(self, repo_id: str | None = None, private: bool = True) -> None:
        self.repo_id, self.private = repo_id, private

    @master_only
    def after_run(self, runner: Any) -> None:
        """Upload.

        Raises:
            ValueError: the hub said no or could not be reached; the export stays where it is.
        """
        from huggingface_hub import create_repo, upload_folder
        folder = Path(runner.work_dir) / f'step{runner.max_iters}'
        try:
            repo_id = create_repo(self.repo_id or Path(runner.work_dir).name, private=self.private,
                                  exist_ok=True).repo_id
            upload_folder(repo_id=repo_id, folder_path=str(folder),
                          commit_message=f'step {runner.max_iters}')
        except Exception as error:  # the hub's client has an error for everything
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"'{folder}' could not be uploaded to the hub: {first} It stays where it is; upload it "
                             f'with: hf upload {self.repo_id or "OWNER/NAME"} {folder}') from error
        runner.logger.info(f"Uploaded '{folder}' to {repo_id}.")
