"""Encoded prompts on disk: each distinct prompt is encoded only once.

A prompt is one small safetensors file, memory-mapped when it is read:

    FOLDER/SCOPE/ab/abcdef….safetensors     SCOPE/scope.json says what the embeddings in it depend on

Runs share the folder without locks. A file is created by a rename, so it is complete or absent. Its checksum covers
name and content: files damaged by a kill or a disk are found, removed and encoded again. Errors here never end a run: a
folder that cannot be written is still read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dgpo_fast.models.family import Rows
from dgpo_fast.wording import one_line

Row = Rows
"""An encoded prompt: named tensors, on the CPU, numbers in the encoders' dtype."""

FREE_SHARE = 0.05
"""Share of the disk that the cache leaves free for checkpoints."""
ABANDONED_S = 3600.0
"""Age of an unfinished file whose writer must have died."""
RACY_S = 2.0
"""A file younger than this may change again without its time showing it."""
DAMAGED = (ValueError, KeyError, RuntimeError, SafetensorError)


def default_folder() -> Path:
    """`$DGPO_FAST_CACHE`, or `dgpo_fast/prompts` in the user's cache folder."""
    if chosen := os.environ.get("DGPO_FAST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dgpo_fast" / "prompts"


class PromptCache:
    """Encoded prompts in `folder`.

    Args:
        folder: shared by any number of runs and models.
        scope: all that an embedding depends on but the prompt: encoders, dtype, lengths, machine, versions.
        limit_bytes: the least recently used files of all scopes go beyond this. Files that were used since this process
            began do not: if these alone fill the cache, nothing is added any more.
        note: told, once each, that the cache is full, cannot be written, or had a damaged file.
    """

    def __init__(self, folder: Path, scope: Mapping[str, object], limit_bytes: int, note: Callable[[str], None]):
        self.folder = folder
        self.scope = dict(scope)
        self.limit_bytes = limit_bytes
        self.note = note
        self.scope_digest = _digest(json.dumps(self.scope, sort_keys=True).encode())
        self.began_s = time.time()
        self.used_bytes: int | None = None  # known from the first write on
        self.writable = True
        self.noted: set[str] = set()

    def touch(self, text: str) -> bool:
        """Whether there is a file for `text`, which then counts as used; whether it is whole shows when it is read."""
        path = self._path(text)
        try:
            os.utime(path)
        except OSError:
            return path.exists()  # as in a folder that cannot be written
        return True

    def load(self, text: str) -> Row | None:
        """The encoded prompt `text`, or None if it is not there or its file was damaged, which is then removed."""
        path = self._path(text)
        try:
            with safe_open(path, framework="pt") as file:
                # Copies are checked and used: the mapped file may yet change.
                row = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                if file.metadata()["checksum"] != self._checksum(text, row):
                    raise ValueError("its checksum does not match")
        except OSError:
            return None
        except DAMAGED as error:
            reason = one_line(error) or type(error).__name__
            self._note_once("damaged", f"prompt cache: {path} is damaged ({reason}) and is encoded again")
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.touch(text)
        return row

    def save(self, text: str, row: Row) -> None:
        """Stores an encoded prompt, if the disk lets it."""
        if not self.writable:
            return
        path = self._path(text)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        tensors = {name: tensor.contiguous() for name, tensor in row.items()}
        content = save(tensors, {"text": text, "checksum": self._checksum(text, row)})
        try:
            if not self._make_room(len(content)):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(content)
            staged.replace(path)
        except OSError as error:
            self.writable = False
            self._note_once(
                "unwritable",
                f"prompt cache {self.folder} cannot be written ({error.strerror}): "
                "newly encoded prompts stay in memory",
            )
            with contextlib.suppress(OSError):
                staged.unlink()

    def has_room(self, *, total_bytes: int, new_bytes: int) -> bool:
        """Whether a run's prompts, `total_bytes` of which `new_bytes` are not there yet, can all be in the cache."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.writable and total_bytes <= self.limit_bytes and new_bytes <= self._free_bytes()
        except OSError:
            return False

    def _make_room(self, size: int) -> bool:
        """Evicts until `size` more bytes fit; False if they cannot."""
        if self.used_bytes is None:
            self._open()
            self.used_bytes = sum(stat.st_size for _, stat in self._files())
        if self.used_bytes + size > self.limit_bytes:
            self._evict(int(0.9 * self.limit_bytes) - size)
        if self.used_bytes + size > self.limit_bytes:
            self._stop(f"holds {self.used_bytes / 2**30:.1f} GiB that running jobs use: raise --prompt-cache-gib")
            return False
        if self._free_bytes() < size:
            self._stop(f"leaves the last {FREE_SHARE:.0%} of the disk free")
            return False
        self.used_bytes += size
        return True

    def _stop(self, why: str) -> None:
        self.writable = False
        self._note_once("full", f"prompt cache {self.folder} {why}; newly encoded prompts stay in memory")

    def _open(self) -> None:
        """Makes the scope's folder and removes what writers that were killed have left."""
        scope = self.folder / self.scope_digest
        scope.mkdir(parents=True, exist_ok=True)
        about = scope / "scope.json"
        if not about.exists():
            staged = about.with_name(f".{about.name}.{os.getpid()}")
            staged.write_text(json.dumps(self.scope, indent=2) + "\n", encoding="utf-8")
            staged.replace(about)
        for path in self.folder.glob("*/*/.*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < self.began_s - ABANDONED_S:
                    path.unlink()

    def _evict(self, target_bytes: int) -> None:
        """Removes the least recently used files until `target_bytes` are left, or only such that this process uses."""
        files = sorted(self._files(), key=lambda file: file[1].st_mtime)
        used = sum(stat.st_size for _, stat in files)
        for path, stat in files:
            if used <= target_bytes or stat.st_mtime >= self.began_s:
                break
            with contextlib.suppress(OSError):  # another run may have been faster
                path.unlink()
            used -= stat.st_size
        self.used_bytes = used

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("*/*/*.safetensors"):
            with contextlib.suppress(OSError):
                yield path, path.stat()

    def _free_bytes(self) -> float:
        disk = shutil.disk_usage(self.folder)
        return disk.free - FREE_SHARE * disk.total

    def _path(self, text: str) -> Path:
        name = _digest(text.encode("utf-8", "surrogatepass"))
        return self.folder / self.scope_digest / name[:2] / f"{name}.safetensors"

    def _checksum(self, text: str, row: Row) -> str:
        digest = hashlib.sha256(f"{self.scope_digest} {self._path(text).name}".encode())
        for name, tensor in sorted(row.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _note_once(self, kind: str, text: str) -> None:
        if kind not in self.noted:
            self.noted.add(kind)
            self.note(text)


def content_digest(pipeline: Path, cache: Path) -> str:
    """Names the text encoders and tokenizers in a pipeline's folder by the content of their files.

    Weights from the Hugging Face hub are stored under the digest of their content, so that only others are read. What
    was read is remembered in `cache` by path, size and time.

    Args:
        pipeline: a folder in diffusers' format.
        cache: the folder of the prompt cache.

    Raises OSError if a file cannot be read.
    """
    return files_digest(pipeline, text_files(pipeline), cache)


def text_files(pipeline: Path) -> list[Path]:
    """The files of the text encoders and tokenizers in a pipeline's folder, and the folders in theirs."""
    return [path for part in ("text_encoder*", "tokenizer*") for path in pipeline.glob(f"{part}/**/*")]


def files_digest(folder: Path, files: Iterable[Path], cache: Path) -> str:
    """Names `files` in `folder` by their places and contents, as `content_digest` does; folders are left out."""
    lines = [f"{path.relative_to(folder).as_posix()} {_file_digest(path, cache)}" for path in files if path.is_file()]
    return _digest("\n".join(sorted(lines)).encode())


def _file_digest(path: Path, cache: Path) -> str:
    path = path.resolve()
    if path.parent.name == "blobs" and len(path.name) == 64:
        return path.name
    stat = path.stat()
    identity = f"{path} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
    memo = cache / "weights" / _digest(identity.encode())
    with contextlib.suppress(OSError, ValueError):
        known, check = memo.read_text(encoding="ascii").split()
        if check == _digest(known.encode()):
            return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_mtime < time.time() - RACY_S:
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            staged = memo.with_name(f".{memo.name}.{os.getpid()}")
            staged.write_text(f"{digest} {_digest(digest.encode())}", encoding="ascii")
            staged.replace(memo)
    return digest


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
