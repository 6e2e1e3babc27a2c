"""A new model on the Hugging Face hub. The address of the hub is that of `huggingface_hub` (HF_ENDPOINT)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError

from dgpo_fast.errors import UserError
from dgpo_fast.models.loading import first_line
from dgpo_fast.wording import one_line

HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
"""Of the library that huggingface_hub speaks HTTP with: httpx until its version 1, then httpx2."""


def require_free(name: str) -> None:
    """Raises UserError if `name` is taken on the hub, if there is no token, or if the hub does not accept it."""
    if get_token() is None:
        raise UserError(f"--push {name}: no token: set HF_TOKEN to one that may write, or run `hf auth login`")
    with _answered(f"--push {name}: the hub does not accept the token"):
        HfApi().whoami()
    with _answered(f"--push {name}: the hub refused it"):
        if HfApi().repo_exists(name):
            raise UserError(f"--push {name}: the hub has a model of that name already: choose another name")


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Makes the model `name` on the hub of the files in `folder`; returns its address.

    The card is checked by the hub first. Raises UserError if something is refused.
    """
    try:
        with _answered(f"--push {name}: the hub refused to check the card"):
            ModelCard.load(folder / "README.md").validate()
    except ValueError as error:
        raise UserError(f"{folder / 'README.md'}: the hub does not accept the card: {first_line(error)}") from None
    with _answered(f"--push {name}: the hub refused to make it; {folder} is complete"):
        address = HfApi().create_repo(name, private=private or None)
    with _answered(f"--push {name}: the upload ended early; `hf upload {name} {folder}` goes on with it"):
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by dgpo-fast export")
    return str(address)


@contextmanager
def _answered(problem: str) -> Iterator[None]:
    """Raises UserError, `problem` and the reason, if the hub refuses or cannot be reached."""
    try:
        yield
    except (HTTP_ERROR, OSError, RuntimeError) as error:
        told = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
        said = getattr(told, "server_message", None) or first_line(told)
        raise UserError(f"{problem}: {one_line(said)}") from None
