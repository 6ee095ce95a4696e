"""Scalars and images in trackio, Hugging Face's tracker: in files of this machine, or in a Space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env

from diffengine_sdxl.config.references import to_plain
from diffengine_sdxl.errors import UserError, first_line
from diffengine_sdxl.loading import checkpoint
from diffengine_sdxl.registry import VISBACKENDS


@VISBACKENDS.register_module()
class TrackioVisBackend(BaseVisBackend):
    """Log to trackio: `trackio show --project PROJECT` opens its dashboard.

    Without `space_id` nothing leaves this machine and no account is needed. A run that is resumed goes on as the same
    run of trackio; one in a work_dir without checkpoints is a new one, also under a name that there was before.

    Args:
        save_dir: `<work_dir>/<time>/vis_data`; the runner sets it.
        project: of trackio.
        name: of the run; None for the work_dir's name.
        space_id: 'owner/name' of a Space on the hub, which is created if it does not exist; the login is that of
            `hf auth login`.
        init_kwargs: more arguments of `trackio.init`.

    Raises:
        UserError: at the first value, if trackio is not installed or refuses an argument.
    """

    def __init__(self, save_dir: str, project: str = 'diffengine_sdxl', name: str | None = None,
                 space_id: str | None = None, init_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(save_dir)
        self.project, self.name, self.space_id, self.init_kwargs = project, name, space_id, init_kwargs or {}
        self.config: dict[str, Any] = {}
        self._env_initialized = False

    def _init_env(self) -> None:
        try:
            import trackio
        except ImportError as error:
            raise UserError('TrackioVisBackend needs the package trackio: pip install "diffengine_sdxl[trackio]".'
                            ) from error
        self._trackio: Any = trackio
        work_dir = Path(self._save_dir).resolve().parents[1]
        resume = 'allow' if checkpoint.list_checkpoints(work_dir) else 'never'
        try:
            self._run = trackio.init(**{'project': self.project, 'name': self.name or work_dir.name, 'embed': False,
                                        'space_id': self.space_id, 'resume': resume, 'config': self.config,
                                        **self.init_kwargs})
        except (TypeError, ValueError, OSError) as error:
            raise UserError(f'TrackioVisBackend: trackio.init refuses project={self.project!r}, '
                            f'space_id={self.space_id!r}: {first_line(error)}') from error

    @property
    @force_init_env
    def experiment(self) -> Any:
        """The run of trackio."""
        return self._run

    def add_config(self, config: Config, **_: Any) -> None:
        """Keep the config for the run, which begins with its first value."""
        # Settings of trackers may contain account names.
        self.config = {key: value for key, value in to_plain(config).items() if key != 'visualizer'}

    @force_init_env
    def add_image(self, name: str, image: np.ndarray, step: int = 0, **_: Any) -> None:
        """Log an image, uint8 [H, W, 3]."""
        self._trackio.log({name: self._trackio.Image(image, caption=f'step {step}')}, step=step)

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **_: Any) -> None:
        """Log a number."""
        self._trackio.log({name: float(value)}, step=step)

    @force_init_env
    def add_scalars(self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **_: Any) -> None:
        """Log numbers."""
        # trackio keeps 'step' and 'time' for itself.
        self._trackio.log({{'time': 'seconds'}.get(name, name): float(value) for name, value in scalar_dict.items()
                           if name != 'step'}, step=step)

    def close(self) -> None:
        """Finish the run, if it has begun."""
        if self._env_initialized:
            self._trackio.finish()
            self._env_initialized = False
