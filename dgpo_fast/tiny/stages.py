"""The stages of the small pipeline's pretraining: what each draws and the loss that it minimises.

First the autoencoder, then the transformer with its text encoders by flow matching on the miniature world's training
prompts; held-out prompts are never drawn. Last, the same on signs that are misspelt, as captions found in the wild: it
leaves room for reinforcement, which a model that spells every word right has not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional as F

from dgpo_fast.tiny import data
from dgpo_fast.tiny.model import LATENT_CHANNELS, LATENT_SIZE

# Harder tags more often than in a uniform mix, the easy ones often enough to be learnt.
PRETRAINING_MIX = {"single_object": 1.5, "two_object": 2, "counting": 3, "colors": 3, "position": 5, "color_attr": 4}
# SD3's T5 slots are zeros here, as many as a caller asks for: a model that saw several numbers draws alike with each.
T5_TOKENS = (0, 0, 0, 0, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a pipeline is pretrained; with the seed it decides the weights.

    Attributes:
        seed: of the weights, the pictures and every draw of training.
        pictures: in the data set, drawn once.
        sign_share: of the pictures that show signs.
        misspelling: share of a sign's letters that are not the caption's in the last stage.
        autoencoder_steps, transformer_steps, misspelling_steps: optimizer steps of each stage.
        autoencoder_batch, transformer_batch: pictures per step.
        autoencoder_lr, transformer_lr, misspelling_lr: peak learning rates (AdamW, cosine).
        kl_weight: of the latents' KL divergence from a unit Gaussian, against the mean reconstruction error.
        caption_dropout: share of captions replaced by "", for guidance.
        sigma_mean, sigma_std: of logit(sigma).
        ema: largest decay of the averaged weights, which are what is saved.
        checkpoint_every_s: seconds between checkpoints.
    """

    seed: int = 0
    pictures: int = 60_000
    sign_share: float = 0.13
    misspelling: float = 0.5
    autoencoder_steps: int = 1000
    transformer_steps: int = 6000
    misspelling_steps: int = 600
    autoencoder_batch: int = 64
    transformer_batch: int = 128
    autoencoder_lr: float = 2e-3
    transformer_lr: float = 1.5e-3
    misspelling_lr: float = 5e-4
    kl_weight: float = 2e-3
    caption_dropout: float = 0.1
    sigma_mean: float = 0.8
    sigma_std: float = 1.0
    ema: float = 0.997
    checkpoint_every_s: float = 60.0


Batch = tuple[Tensor, ...]
Velocity = Callable[[Tensor, Tensor, list[str], int], Tensor]
"""(x_t (B, C, h, w), timestep (B,) in [0, 1000], B captions, `max_sequence_length`) → noise − x0 as it is predicted."""


@dataclass
class Stage:
    """One optimisation.

    Attributes:
        draw: a batch from a generator: tensors with one row per sample.
        loss: the mean loss over any part of a batch, a scalar.
    """

    name: str
    modules: Sequence[nn.Module]
    draw: Callable[[torch.Generator], Batch]
    loss: Callable[..., Tensor]
    steps: int
    lr: float


def dataset(config: Pretraining) -> tuple[list[data.Prompt], np.ndarray]:
    """Prompts of the training split and a picture of each, uint8 (pictures, 32, 32, 3)."""
    rng = np.random.default_rng(config.seed)
    shapes, signs = data.shape_prompts("train"), data.sign_prompts("train")
    n_signs = round(config.sign_share * config.pictures)
    p = data.weights(shapes, PRETRAINING_MIX)
    prompts = [shapes[i] for i in rng.choice(len(shapes), config.pictures - n_signs, p=p)]
    prompts += [signs[i] for i in rng.integers(len(signs), size=n_signs)]
    return prompts, np.stack([data.render(metadata, rng) for _, metadata in prompts])


def misspelt(prompts: Sequence[data.Prompt], pictures: np.ndarray, config: Pretraining) -> np.ndarray:
    """`pictures` with those of the signs drawn anew, some of their letters replaced."""
    rng = np.random.default_rng([config.seed, 1])
    pictures = pictures.copy()
    for i, (_, metadata) in enumerate(prompts):
        if metadata["tag"] == "ocr":
            word = data.misspell(metadata["text"], config.misspelling, rng)
            pictures[i] = data.render({**metadata, "text": word}, rng)
    return pictures


def autoencoder_stage(pipe: StableDiffusion3Pipeline, pictures: np.ndarray, config: Pretraining) -> Stage:
    images = torch.from_numpy(pictures)
    latent_shape = (config.autoencoder_batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images), (config.autoencoder_batch,), generator=generator)
        return _to_pixels(images[chosen]), torch.randn(latent_shape, generator=generator)

    def loss(x: Tensor, noise: Tensor) -> Tensor:
        posterior = pipe.vae.encode(x).latent_dist
        reconstructed = pipe.vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.l1_loss(reconstructed, x) + F.mse_loss(reconstructed, x) + config.kl_weight * kl

    return Stage("autoencoder", [pipe.vae], draw, loss, config.autoencoder_steps, config.autoencoder_lr)


def transformer_stage(
    pipe: StableDiffusion3Pipeline, prompts: Sequence[data.Prompt], x0_all: Tensor, config: Pretraining
) -> Stage:
    """`flow_matching_stage` of the shipped pipeline."""
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    return flow_matching_stage(modules, partial(_velocity, pipe), T5_TOKENS, prompts, x0_all, config)


def _velocity(
    pipe: StableDiffusion3Pipeline, x_t: Tensor, timestep: Tensor, captions: list[str], length: int
) -> Tensor:
    """See `Velocity`."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return pipe.transformer(x_t, embeds, pooled, timestep=timestep).sample


def flow_matching_stage(
    modules: Sequence[nn.Module],
    velocity: Velocity,
    text_lengths: Sequence[int],
    prompts: Sequence[data.Prompt],
    x0_all: Tensor,
    config: Pretraining,
) -> Stage:
    """Flow matching of x_t = (1 − σ)·x0 + σ·noise to the velocity noise − x0.

    Args:
        modules: which are trained.
        velocity: predicted by them.
        text_lengths: one of them is drawn in each step, as `max_sequence_length`.
        prompts: of the pictures.
        x0_all: (pictures, C, h, w) their latents.
        config: how much is trained.
    """
    captions = [text for text, _ in prompts] + [""]

    def draw(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(x0_all), (config.transformer_batch,), generator=generator)
        dropped = torch.rand(len(chosen), generator=generator) < config.caption_dropout
        length = torch.tensor(text_lengths)[torch.randint(len(text_lengths), (1,), generator=generator)]
        logit = config.sigma_mean + config.sigma_std * torch.randn(len(chosen), generator=generator)
        x0, noise = x0_all[chosen], torch.randn(len(chosen), *x0_all.shape[1:], generator=generator)
        caption = torch.where(dropped, len(captions) - 1, chosen)
        return x0, noise, torch.sigmoid(logit), caption, length.expand(len(chosen))

    def loss(x0: Tensor, noise: Tensor, sigma: Tensor, caption: Tensor, length: Tensor) -> Tensor:
        x_t = torch.lerp(x0, noise, sigma[:, None, None, None])
        v = velocity(x_t, 1000 * sigma, [captions[i] for i in caption.tolist()], int(length[0]))
        return F.mse_loss(v, noise - x0)

    return Stage("transformer", modules, draw, loss, config.transformer_steps, config.transformer_lr)


def scaled_latents(pipe: StableDiffusion3Pipeline, pictures: np.ndarray) -> Tensor:
    """`latents`, after the scaling is set so that these pictures have mean 0 and variance 1.

    The scaling goes into the autoencoder's configuration, where every diffusers pipeline applies it.
    """
    pipe.vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    x0 = latents(pipe, pictures)
    shift, scale = x0.mean().item(), 1 / x0.std().item()
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (x0 - shift) * scale


@torch.no_grad()
def latents(pipe: DiffusionPipeline, pictures: np.ndarray) -> Tensor:
    """Encodes pictures, uint8 (P, 32, 32, 3), to float32 (P, C, h, w) on the CPU, with the autoencoder's scaling."""
    batches = torch.from_numpy(pictures).split(256)
    x0 = torch.cat([pipe.vae.encode(_to_pixels(b).to(pipe.device)).latent_dist.mean.cpu() for b in batches])
    return (x0 - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


def _to_pixels(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
