"""Fingerprints of pipelines: they tell whether a model is still the one that something was made with."""

import hashlib
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from dgpo_fast.errors import UserError
from dgpo_fast.models.loading import find_variant, lacks_text_encoders, text_encoders
from dgpo_fast.models.prompt_cache import content_digest, default_folder, files_digest, text_files

ELEMENTS = 256
WEIGHT_FILES = (".safetensors", ".bin", ".json")


def weights_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Names all that draws and reads prompts in a pipeline by the content of its files, as `content_digest` does.

    A file is read once: the next start on this machine knows its content. Random weights, which have no files, are
    told apart by some of their elements (`sampled_fingerprint`).

    Raises UserError if a file cannot be read.
    """
    if pipeline.name_or_path is None:
        return sampled_fingerprint(pipeline)
    folder = Path(pipeline.name_or_path)
    variant = find_variant(folder)
    weights = [
        path
        for part in ("transformer", "vae")
        for path in (folder / part).glob("**/*")
        if path.suffix in WEIGHT_FILES and (variant is not None or ".fp16." not in path.name)
    ]
    try:
        return files_digest(folder, [*weights, *text_files(folder)], default_folder())
    except OSError as error:
        raise UserError(f"model '{folder}': {error.filename} cannot be read: {error.strerror}") from None


def sampled_fingerprint(pipeline: DiffusionPipeline, *, with_text: bool = False) -> str:
    """A digest of some elements of every weight of transformer and decoder, rounded to bf16; it reads no weights' file.

    The same weights in fp32 and in bf16 have the same one. Earlier versions have kept it for runs, and `with_text`
    for folders of groups.

    Args:
        pipeline: as it was loaded.
        with_text: also of the text encoders; those that are not loaded count by the content of their files.
    """
    digest = hashlib.blake2b(digest_size=16)
    modules = [pipeline.transformer, pipeline.vae]
    if with_text:
        modules += text_encoders(pipeline)
        if lacks_text_encoders(pipeline):
            digest.update(content_digest(Path(pipeline.name_or_path), default_folder()).encode())
    for module in modules:
        for name, parameter in module.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // ELEMENTS)]
            digest.update(some.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()
