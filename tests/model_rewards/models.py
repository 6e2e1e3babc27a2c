"""Small untrained models of the rewards' architectures, in the files they are published in, and what they compute.

The forwards written out here read a checkpoint's own keys, so that they check the loading as well as the networks.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    BertTokenizerFast,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

Weights = dict[str, torch.Tensor]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CLIP_TOKENS = 48


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP of 32-pixel images with a tokenizer that reads letters, as a transformers folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "-</w>", "<|startoftext|>", "<|endoftext|>"]
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CLIP_TOKENS,
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(folder)
    tokens = {token: index for index, token in enumerate(vocabulary)}
    CLIPTokenizer(vocab=tokens, merges=[], unk_token="<|endoftext|>").save_pretrained(folder)
    return folder


def save_mask2former(folder: Path, labels: int = 80, seed: int = 0) -> Path:
    """A Mask2Former on a Swin, as a transformers folder."""
    torch.manual_seed(seed)
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        num_queries=10,
        num_labels=labels,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def save_bert_tokenizer(folder: Path) -> Path:
    """An uncased BERT tokenizer that reads letters."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    BertTokenizerFast(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder


def predictor_weights(width: int = 32, seed: int = 0) -> Weights:
    """The aesthetic predictor's five layers; the first is as wide as the CLIP here."""
    sizes = {0: (16, width), 2: (8, 16), 4: (6, 8), 6: (4, 6), 7: (1, 4)}
    return _random({f"layers.{n}.weight": size for n, size in sizes.items()}, seed) | _random(
        {f"layers.{n}.bias": (size[0],) for n, size in sizes.items()}, seed + 1
    )


def open_clip_weights(
    seed: int = 0,
    vision: tuple[int, int, int] = (160, 2, 17),
    text: tuple[int, int, int, int] = (128, 2, CLIP_TOKENS, 55),
    projection: int = 96,
) -> Weights:
    """A ViT-H-14 of open_clip: width, layers and patches + 1; width, layers, tokens and vocabulary. Two heads here."""
    (v, depth, patches), (t, text_depth, length, vocabulary) = vision, text
    mlp = 4 if v == 1280 else 2
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (length, t),
        "text_projection": (t, projection),
        "token_embedding.weight": (vocabulary, t),
        "ln_final.weight": (t,),
        "ln_final.bias": (t,),
        "logit_scale": (),
        "visual.class_embedding": (v,),
        "visual.positional_embedding": (patches, v),
        "visual.proj": (v, projection),
        "visual.conv1.weight": (v, 3, 14, 14),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (v,), f"visual.{norm}.bias": (v,)}
    for tower, width, layers in (("transformer", t, text_depth), ("visual.transformer", v, depth)):
        for layer in range(layers):
            shapes |= _block(f"{tower}.resblocks.{layer}.", width, mlp)
    return _random(shapes, seed)


def open_clip_features(
    weights: Weights, images: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of prepared images (B, 3, S, S) and of tokens (B, T) that end with the vocabulary's last."""
    w = weights
    x = F.conv2d(images, w["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + w["visual.positional_embedding"]
    x = _norm(w, "visual.ln_pre", x, 1e-5)
    for layer in range(2):
        x = _open_clip_block(w, f"visual.transformer.resblocks.{layer}.", x, heads=2)
    seen = _norm(w, "visual.ln_post", x[:, 0], 1e-5) @ w["visual.proj"]
    t = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    causal = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)
    for layer in range(2):
        t = _open_clip_block(w, f"transformer.resblocks.{layer}.", t, heads=2, mask=causal)
    ends = (tokens == len(w["token_embedding.weight"]) - 1).int().argmax(1)
    read = _norm(w, "ln_final", t, 1e-5)[torch.arange(len(t)), ends] @ w["text_projection"]
    return F.normalize(seen, dim=-1), F.normalize(read, dim=-1)


def image_reward_weights(
    vision_size: tuple[int, int, int] = (128, 2, 17),
    text_size: tuple[int, int, int, int] = (128, 2, 40, 59),
    seed: int = 0,
) -> Weights:
    """ImageReward's file: width, layers and patches + 1; width, layers, places and vocabulary. Two heads here.

    It also holds the two projections that scoring leaves.
    """
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    (v, depth, patches), (t, text_depth, places, vocabulary) = vision_size, text_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}cls_token": (1, 1, v),
        f"{vision}pos_embed": (1, patches, v),
        f"{vision}patch_embed.proj.weight": (v, 3, 16, 16),
        f"{vision}patch_embed.proj.bias": (v,),
        f"{vision}norm.weight": (v,),
        f"{vision}norm.bias": (v,),
        f"{text}embeddings.word_embeddings.weight": (vocabulary, t),
        f"{text}embeddings.position_embeddings.weight": (places, t),
        f"{text}embeddings.LayerNorm.weight": (t,),
        f"{text}embeddings.LayerNorm.bias": (t,),
        "blip.vision_proj.weight": (16, v),
        "blip.vision_proj.bias": (16,),
        "blip.text_proj.weight": (16, t),
        "blip.text_proj.bias": (16,),
    }
    for layer in range(depth):
        block = f"{vision}blocks.{layer}."
        shapes |= _linear(f"{block}attn.qkv", 3 * v, v) | _linear(f"{block}attn.proj", v, v)
        shapes |= _linear(f"{block}mlp.fc1", 4 * v, v) | _linear(f"{block}mlp.fc2", v, 4 * v)
        shapes |= {f"{block}{norm}.{kind}": (v,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    for layer in range(text_depth):
        block = f"{text}encoder.layer.{layer}."
        for attention, inputs in (("attention", t), ("crossattention", v)):
            shapes |= _linear(f"{block}{attention}.self.query", t, t) | _linear(
                f"{block}{attention}.output.dense", t, t
            )
            shapes |= _linear(f"{block}{attention}.self.key", t, inputs)
            shapes |= _linear(f"{block}{attention}.self.value", t, inputs)
            shapes |= {f"{block}{attention}.output.LayerNorm.{kind}": (t,) for kind in ("weight", "bias")}
        shapes |= _linear(f"{block}intermediate.dense", 4 * t, t) | _linear(f"{block}output.dense", t, 4 * t)
        shapes |= {f"{block}output.LayerNorm.{kind}": (t,) for kind in ("weight", "bias")}
    sizes = {0: (32, t), 2: (16, 32), 4: (8, 16), 6: (4, 8), 7: (1, 4)}
    for number, (outputs, inputs) in sizes.items():
        shapes |= _linear(f"mlp.layers.{number}", outputs, inputs)
    return _random(shapes, seed)


def image_reward_score(
    weights: Weights, images: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Scores (B,) of prepared images (B, 3, 64, 64) for tokens (B, T), of which `mask` says which are no padding."""
    w = weights
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(images, w[f"{vision}patch_embed.proj.weight"], w[f"{vision}patch_embed.proj.bias"], stride=16)
    x = torch.cat([w[f"{vision}cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + w[f"{vision}pos_embed"]
    for layer in range(2):
        block = f"{vision}blocks.{layer}."
        q, k, v = _apply(w, f"{block}attn.qkv", _norm(w, f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + _apply(w, f"{block}attn.proj", _attend(q, k, v, 2))
        inner = F.gelu(_apply(w, f"{block}mlp.fc1", _norm(w, f"{block}norm2", x, 1e-6)))
        x = x + _apply(w, f"{block}mlp.fc2", inner)
    x = _norm(w, f"{vision}norm", x, 1e-6)
    places = w[f"{text}embeddings.position_embeddings.weight"][: tokens.shape[1]]
    t = _norm(w, f"{text}embeddings.LayerNorm", w[f"{text}embeddings.word_embeddings.weight"][tokens] + places, 1e-12)
    hidden = torch.where(mask[:, None, None] == 1, 0.0, -torch.inf)
    for layer in range(2):
        block = f"{text}encoder.layer.{layer}."
        for attention, source, blocked in (("attention", None, hidden), ("crossattention", x, None)):
            inside = t if source is None else source
            q = _apply(w, f"{block}{attention}.self.query", t)
            k, v = (_apply(w, f"{block}{attention}.self.{part}", inside) for part in ("key", "value"))
            out = _apply(w, f"{block}{attention}.output.dense", _attend(q, k, v, 2, blocked))
            t = _norm(w, f"{block}{attention}.output.LayerNorm", t + out, 1e-12)
        out = _apply(w, f"{block}output.dense", F.gelu(_apply(w, f"{block}intermediate.dense", t)))
        t = _norm(w, f"{block}output.LayerNorm", t + out, 1e-12)
    score = t[:, 0]
    for number in (0, 2, 4, 6, 7):
        score = _apply(w, f"mlp.layers.{number}", score)
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def teach_clip(clip, pixels: torch.Tensor, texts: list[str], cosines: np.ndarray, steps: int = 400) -> None:
    """Trains a `Clip` until prepared images (B, 3, S, S) and T texts have about the cosines (B, T)."""
    model, target = clip.model, torch.as_tensor(cosines, dtype=torch.float32)
    tokens = clip._tokenizer(texts, padding="max_length", truncation=True, max_length=CLIP_TOKENS, return_tensors="pt")
    model.requires_grad_(True)
    model.logit_scale.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(steps):
        seen = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        read = model.get_text_features(input_ids=tokens["input_ids"]).pooler_output
        loss = 100 * F.mse_loss(seen @ F.normalize(read, dim=-1).T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)


def teach_predictor(features: torch.Tensor, scores: list[float]) -> Weights:
    """A predictor's five layers that give features (B, D) these scores: one path through them that is a linear map."""
    layers = {key: torch.zeros_like(value) for key, value in predictor_weights().items()}
    wanted = torch.tensor(scores, dtype=torch.float64)
    # The smallest map that fits, around the mean.
    centred = features.double() - features.double().mean(0)
    weight = torch.linalg.lstsq(centred, wanted - wanted.mean(), driver="gelsd").solution
    layers["layers.0.weight"][0] = weight.float()
    for number in (2, 4, 6, 7):
        layers[f"layers.{number}.weight"][0, 0] = 1
    layers["layers.7.bias"][:] = (wanted.mean() - features.double().mean(0) @ weight).float()
    return layers


def teach_image_reward(reward, pixels: torch.Tensor, texts: list[str], scores: list[float], steps: int = 150) -> None:
    """Trains an `ImageRewardReward` until it gives images (B, 3, H, W) in 0..255 about these scores."""
    parameters = [p for module in (reward._vision, reward._text, reward._head) for p in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, 1e-3)
    for _ in range(steps):
        loss = F.mse_loss(reward._score(pixels, texts), torch.tensor(scores))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)


def teach_detector(detector, pixels: torch.Tensor, steps: int = 120) -> None:
    """Trains a `Detector` until it sees one person, large, in the first of prepared pictures (B, 3, H, W), and nothing
    in the others."""
    model = detector._model
    wanted = torch.full((len(pixels), model.config.num_queries), model.config.num_labels)
    wanted[0, 0] = 0
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        outputs = model(pixel_values=pixels)
        mask = outputs.masks_queries_logits[0, 0]
        shown = torch.zeros_like(mask)
        shown[2:, 2:-2] = 1
        loss = F.cross_entropy(outputs.class_queries_logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        loss = loss + F.binary_cross_entropy_with_logits(mask, shown)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = {key: 0.1 * torch.randn(shape) for key, shape in shapes.items()}
    for key, value in weights.items():
        if key.endswith("weight") and value.ndim == 1:  # of a norm
            value += 1
    return weights


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _block(prefix: str, width: int, mlp: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}attn.in_proj_weight": (3 * width, width)}
    shapes |= {f"{prefix}attn.in_proj_bias": (3 * width,)} | _linear(f"{prefix}attn.out_proj", width, width)
    shapes |= _linear(f"{prefix}mlp.c_fc", mlp * width, width) | _linear(f"{prefix}mlp.c_proj", width, mlp * width)
    return shapes | {f"{prefix}{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}


def _open_clip_block(
    w: Weights, prefix: str, x: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    inside = _norm(w, f"{prefix}ln_1", x, 1e-5)
    q, k, v = F.linear(inside, w[f"{prefix}attn.in_proj_weight"], w[f"{prefix}attn.in_proj_bias"]).chunk(3, -1)
    x = x + _apply(w, f"{prefix}attn.out_proj", _attend(q, k, v, heads, mask))
    inner = F.gelu(_apply(w, f"{prefix}mlp.c_fc", _norm(w, f"{prefix}ln_2", x, 1e-5)))
    return x + _apply(w, f"{prefix}mlp.c_proj", inner)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _apply(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)
