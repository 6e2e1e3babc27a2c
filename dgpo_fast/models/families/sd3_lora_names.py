"""The original names of Stable Diffusion 3's layers, which kohya's scripts, ComfyUI and OneTrainer give to LoRAs.

Query, key and value are one layer there; OneTrainer numbers the three.
"""

from collections.abc import Iterator

from dgpo_fast.models.lora_names import Target

BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}
"""Original names in `joint_blocks.N`: diffusers' in `transformer_blocks.N`."""
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
"""Original names outside of the blocks: diffusers'."""


def original_names(blocks: int) -> Iterator[tuple[str, Target]]:
    """Original names, and what they mean, of a transformer with that many blocks."""
    for name, layer in OUTSIDE.items():
        yield name, Target((layer,), swapped=layer == "norm_out.linear")
    for block in range(blocks):
        for name, layers in BLOCK.items():
            # The last block has no other use of the text, and modulates it as the final layer does the image.
            swapped = block == blocks - 1 and layers == ("norm1_context.linear",)
            whole = tuple(f"transformer_blocks.{block}.{layer}" for layer in layers)
            yield f"joint_blocks.{block}.{name}", Target(whole, swapped)
            if len(whole) > 1:
                yield from ((f"joint_blocks.{block}.{name}.{n}", Target((layer,))) for n, layer in enumerate(whole))
