"""A folder of encoded pictures: one safetensors file each, named by the content of picture and model.

A file is either complete or absent. A picture that has changed, or another model, has another name: nothing in the
folder can be out of date. Nothing is unpickled.
"""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.preferences import picture_digest
from dgpo_fast.rollout.group_folder import written_whole
from dgpo_fast.wording import one_line


class LatentFolder:
    """Encoded pictures in the folder `home`, which is made when the first one is saved.

    Args:
        home: the folder.
        model: names what encodes, by its content.
    """

    def __init__(self, home: Path, model: str):
        self.home, self.model = home, model

    def has(self, picture: Path) -> bool:
        """Whether `picture` is encoded."""
        return self._path(picture).exists()

    def save(self, picture: Path, latent: Tensor) -> None:
        """Keeps the latent (C, H, W) of `picture`."""
        with written_whole(self._path(picture)) as file:
            self.home.mkdir(parents=True, exist_ok=True)
            save_file({"x0": latent.contiguous().cpu()}, file)

    def load(self, picture: Path) -> Tensor:
        """The latent (C, H, W) of `picture`, on the CPU."""
        path = self._path(picture)
        try:
            return load_file(path)["x0"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"{path}: damaged ({one_line(error)}): remove it and it is encoded again") from None

    def _path(self, picture: Path) -> Path:
        name = hashlib.sha256(f"{self.model}{picture_digest(picture)}".encode()).hexdigest()[:32]
        return self.home / f"{name}.safetensors"
