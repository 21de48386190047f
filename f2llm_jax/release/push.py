"""A release to the Hugging Face Hub; nothing leaves the machine unless that is said."""

import os
import pathlib

import huggingface_hub

from f2llm_jax.errors import UserError
from f2llm_jax.release.flags import TOKEN_VARIABLE
from f2llm_jax.release.sentence_transformers import MODULES_FILE
from f2llm_jax.storage.files import holds
from f2llm_jax.storage.folders import INCOMPLETE


def files_to_push(folder: str) -> list[tuple[str, int]]:
    """Path and size of every file of a release, sorted.

    Raises:
      UserError: it is not a complete release, or the header of its card cannot be read.
    """
    root = pathlib.Path(folder)
    if not (root / MODULES_FILE).exists() or not (root / "config.json").exists() or (root / INCOMPLETE).exists():
        raise UserError(f"{folder} is not a complete release; write one with `convert to-hf`")
    try:
        huggingface_hub.ModelCard.load(root / "README.md")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/README.md: the Hub would not read its header ({error})") from error
    return sorted((file.relative_to(root).as_posix(), file.stat().st_size) for file in root.rglob("*") if _is_pushed(file, root))


def _is_pushed(file: pathlib.Path, root: pathlib.Path) -> bool:
    """Plain files of the folder itself: no dot files, and nothing behind a link that leaves the folder."""
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.is_file() and not hidden and holds(root, file)


def push(folder: str, repo_id: str, *, private: bool) -> str:
    """Uploads the release and returns its address. The token is taken from the environment and handed to the client only.

    Raises:
      UserError: no token, no complete release, or the Hub refuses.
    """
    names = [name for name, _ in files_to_push(folder)]
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserError(f"set {TOKEN_VARIABLE} to a token that may write to {repo_id}")
    api = huggingface_hub.HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="Release by f2llm_jax")
    except Exception as error:  # the client has a class for each of offline, no permission, bad name
        raise UserError(f"the Hub refused {repo_id} ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    return str(address)
