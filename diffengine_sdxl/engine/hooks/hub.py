"""Upload the final export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook

from diffengine_sdxl.engine.runner import ExperimentRunner
from diffengine_sdxl.errors import UserError, first_line
from diffengine_sdxl.registry import HOOKS


@HOOKS.register_module()
class PushToHubHook(Hook):
    """Upload `step<N>/` of the last step when training has ended.

    The token is that of `hf auth login` or HF_TOKEN: one in a config would end up in files.

    Args:
        repo_id: 'owner/name'; None for the work_dir's name, under the token's account.
        private: make a new repository private.
    """

    priority = 'VERY_LOW'

    def __init__(self, repo_id: str | None = None, private: bool = True) -> None:
        self.repo_id, self.private = repo_id, private

    @master_only
    def after_run(self, runner: ExperimentRunner) -> None:
        """Upload the export.

        Raises:
            UserError: the hub refuses it or cannot be reached; the export stays in place.
        """
        from huggingface_hub import create_repo, upload_folder
        from huggingface_hub.errors import HTTPError  # httpx's
        folder = Path(runner.work_dir) / f'step{runner.max_iters}'
        try:
            repo_id = create_repo(self.repo_id or Path(runner.work_dir).name, private=self.private,
                                  exist_ok=True).repo_id
            upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f'step {runner.max_iters}')
        # ValueError: an invalid repo_id. RuntimeError: of hf_xet, which transfers the files.
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"'{folder}' could not be uploaded to the hub: {first_line(error)} Upload it with: "
                            f'hf upload {self.repo_id or "OWNER/NAME"} {folder}') from error
        runner.logger.info(f"Uploaded '{folder}' to {repo_id}.")
