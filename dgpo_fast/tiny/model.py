"""The small pipeline before it has learnt anything: SD3.5-Medium's parts in miniature."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from dgpo_fast.tiny import data

TEXT_TOKENS = 12
LATENT_CHANNELS = 12
LATENT_SIZE = 8
_TEXT_WIDTH = 64
_WIDTH, _HEADS, _LAYERS = 128, 4, 4


def words() -> list[str]:
    """The words of every shape prompt and of the frame of every sign prompt, sorted."""
    texts = [text for text, _ in data.all_prompts()] + ["a sign that says"]
    return sorted({word for text in texts for word in text.split()})


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each of `words()`; any other text becomes one token per byte.

    A word on a sign must reach the model letter by letter, whatever words the vocabulary has. Merges would fuse some
    of its letters, so whole words are added tokens and there are no merges.
    """
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *bytes_, *(f"{b}</w>" for b in bytes_)]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TEXT_TOKENS
    )
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words()])
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=_TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_autoencoder() -> AutoencoderKL:
    """32 × 32 × 3 pixels to 8 × 8 × 12 latents, without quantisation convolutions, as SD3's."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 40),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=data.SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> SD3Transformer2DModel:
    """16 image tokens; its blocks start as identities and its output as zero, which learns sooner than random ones."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=_LAYERS,
        attention_head_dim=_WIDTH // _HEADS,
        num_attention_heads=_HEADS,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    for name, p in transformer.named_parameters():
        if name.startswith("proj_out") or (".norm1" in name and ".linear" in name):
            nn.init.zeros_(p)
    return transformer


def build_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """The whole pipeline with random weights drawn from `seed`, in float32 on the CPU.

    There is no third text encoder: diffusers then fills the T5 slots with zeros.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = build_tokenizer(), build_tokenizer()
        return StableDiffusion3Pipeline(
            transformer=build_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=build_autoencoder(),
            text_encoder=build_text_encoder(first),
            tokenizer=first,
            text_encoder_2=build_text_encoder(second),
            tokenizer_2=second,
            text_encoder_3=None,
            tokenizer_3=None,
        )
