"""Pipelines with random weights: the sizes of the real one, repeatable, and loudly said to mean nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import read_architecture
from dgpo_fast.models.families import make_family
from dgpo_fast.models.families.sd3 import SD3, SD35_MEDIUM, sd35_medium
from dgpo_fast.models.forward import predict
from dgpo_fast.models.latents import decode_plainly
from dgpo_fast.models.loading import make_pipeline, reads_no_text
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.models.random_weights import find_architecture, random_pipeline
from dgpo_fast.train import train
from tests.sd3 import medium

CPU = torch.device("cpu")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shallow() -> SD3:
    """SD3.5-Medium's layers, 3 of them and narrow; small text encoders of the same kinds."""
    whole = sd35_medium()
    clip, big, t5 = (whole.text_encoders[name] for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoders = {
        "text_encoder": type(clip).from_dict({**clip.to_dict(), **small, "projection_dim": 16}),
        "text_encoder_2": type(big).from_dict({**big.to_dict(), **small, "projection_dim": 16}),
        "text_encoder_3": type(t5).from_dict(
            {**t5.to_dict(), "d_model": 48, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        ),
    }
    transformer = {
        **whole.transformer,
        "num_layers": 3,
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "dual_attention_layers": (0, 1),
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "sample_size": 8,
    }
    vae = {**whole.vae, "block_out_channels": (32, 32, 32, 32)}
    return SD3(replace(whole, transformer=transformer, vae=vae, text_encoders=encoders))


def test_sd35_medium_has_the_published_sizes() -> None:
    """Parameter counts of every module, and the settings that the arithmetic of the method depends on."""
    family = medium()
    architecture = family.architecture
    with torch.device("meta"):
        transformer, vae = family.build_transformer(), family.build_vae()
        encoders = [architecture.build_text_encoder(name) for name in architecture.text_encoders]
    assert count(transformer) == 2_243_171_520
    assert count(vae) == 83_819_683
    assert [count(encoder) for encoder in encoders] == [123_650_304, 694_659_840, 4_762_310_656]
    blocks = transformer.transformer_blocks
    assert [index for index, block in enumerate(blocks) if block.use_dual_attention] == list(range(13))
    assert len(blocks) == 24 and blocks[-1].context_pre_only and not blocks[-2].context_pre_only
    assert type(blocks[0].attn.norm_q).__name__ == "RMSNorm"
    c = transformer.config
    assert (c.num_attention_heads, c.attention_head_dim, c.patch_size, c.in_channels) == (24, 64, 2, 16)
    assert (c.caption_projection_dim, c.pooled_projection_dim, c.joint_attention_dim) == (1536, 2048, 4096)
    assert (c.pos_embed_max_size, c.sample_size, transformer.pos_embed.pos_embed.shape[1]) == (384, 128, 384**2)
    assert tuple(vae.config.block_out_channels) == (128, 256, 512, 512) and vae.config.latent_channels == 16
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5305, 0.0609)
    assert sum(encoder.config.projection_dim for encoder in encoders[:2]) == c.pooled_projection_dim
    assert encoders[2].config.d_model == c.joint_attention_dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_repeatable_and_signals_stay_finite(dtype: torch.dtype) -> None:
    """One seed, one model; velocities and pictures are of order one, and every block changes them."""
    first, again, other = (random_pipeline(shallow(), device=CPU, dtype=dtype, seed=seed) for seed in (0, 0, 1))
    weights = [dict(pipeline.transformer.named_parameters()) for pipeline in (first, again, other)]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert not torch.equal(weights[0]["proj_out.weight"], weights[2]["proj_out.weight"])
    assert {p.dtype for p in weights[0].values()} == {dtype} == {b.dtype for b in first.transformer.buffers()}
    assert first.scheduler.config.shift == 3.0 and not first.transformer.training
    text = PromptEncoder(first, 128)(["a cat", "a dog"])
    x_t, timestep = torch.randn(2, 16, 8, 8), torch.tensor(700.0)
    with torch.no_grad():
        velocity = predict(first.transformer, x_t, timestep, text)
        assert velocity.isfinite().all() and 0.1 < velocity.float().std() < 10
        for block in first.transformer.transformer_blocks:
            block.ff.net[2].weight.zero_()
            changed = predict(first.transformer, x_t, timestep, text)
            assert (changed - velocity).float().abs().max() > 0.02
            velocity = changed
    images = decode_plainly(first.vae, x_t, 2).images
    assert images.shape == (2, 64, 64, 3) and images.std() > 10


def test_the_position_table_is_the_real_one() -> None:
    family = shallow()
    table = random_pipeline(family, device=CPU, dtype=torch.bfloat16, seed=0).transformer.pos_embed.pos_embed
    assert torch.equal(table, family.build_transformer().pos_embed.pos_embed.bfloat16())


def test_torch_generators_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    random_pipeline(shallow(), device=CPU, dtype=torch.bfloat16, seed=0)
    assert torch.equal(torch.rand(4), expected) and torch.get_default_dtype() == torch.float32


def test_embeddings_without_encoders_are_a_function_of_the_text() -> None:
    pipeline = random_pipeline(shallow(), device=CPU, dtype=torch.bfloat16, seed=0)
    embeds = PromptEncoder(pipeline, 128)(["a cat", "a dog", ""])
    assert embeds.rows["prompt"].shape == (3, 77 + 128, 48) and embeds.rows["pooled"].shape == (3, 32)
    assert embeds.rows["prompt"].dtype == torch.bfloat16
    again = PromptEncoder(random_pipeline(shallow(), device=CPU, dtype=torch.bfloat16, seed=9), 128)(["a dog"])
    assert torch.equal(again.rows["prompt"][0], embeds.rows["prompt"][1]) and not torch.equal(
        embeds.rows["prompt"][0], embeds.rows["prompt"][1]
    )


def test_text_encoders_are_built_where_asked_for() -> None:
    """Real encoders with random weights read letters, without a tokenizer's files."""
    family = shallow()
    pipeline = random_pipeline(family, device=CPU, dtype=torch.float32, seed=0, text_encoders=True)
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    embeds = PromptEncoder(pipeline, 20)(["Two red cups!", "Two red cats!"])
    tokens, pooled = embeds.gathered().values()
    assert tokens.shape == (2, 97, 48) and pooled.shape == (2, 32)
    assert embeds.rows["prompt"].isfinite().all()
    for part in (
        embeds.rows["prompt"][:, :77],
        embeds.rows["prompt"][:, 77:],
        embeds.rows["pooled"][:, :16],
        embeds.rows["pooled"][:, 16:],
    ):
        assert not torch.equal(part[0], part[1])


def test_a_folder_gives_its_own_sizes(random_pipeline: Path) -> None:
    architecture = read_architecture(random_pipeline)
    config = configure(["--model", str(random_pipeline), "--random-weights", "--random-text-encoders"])
    built = make_pipeline(config, device=CPU, dtype=torch.float32)
    original = make_pipeline(configure(["--model", str(random_pipeline)]), device=CPU, dtype=torch.float32)
    for name in ("transformer", "vae", *architecture.text_encoders):
        shapes = [{key: t.shape for key, t in getattr(p, name).state_dict().items()} for p in (built, original)]
        assert shapes[0] == shapes[1], name
    with_same = [PromptEncoder(pipeline, 9)(["a cat"]).rows["prompt"].shape for pipeline in (built, original)]
    assert with_same[0] == with_same[1]
    config = configure(["--model", str(random_pipeline), "--random-weights"])
    without = make_pipeline(config, device=CPU, dtype=torch.float32)
    assert reads_no_text(without) and not reads_no_text(built)
    assert PromptEncoder(without, 9)(["a cat"]).rows["prompt"].shape == with_same[0]


SMALL = """
random_weights: true
prompts: prompts.txt
rewards: [jpeg]
iterations: 1
name: run
device: cpu
rollout: {group_size: 2, groups: 2, num_inference_steps: 2, max_sequence_length: 9}
dgpo: {timesteps: 1}
evaluation: {images: 2, num_inference_steps: 2}
"""


def test_a_run_says_that_it_means_nothing(
    tmp_path: Path, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--random-weights` trains end to end and resumes on the same weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na house\ntwo birds\n")
    (tmp_path / "small.yaml").write_text(SMALL)
    assert train(["small.yaml", "--model", str(random_pipeline)]) == 0
    assert f"RANDOM WEIGHTS: {random_pipeline} was not loaded" in capsys.readouterr().out
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0


def test_other_names_are_refused() -> None:
    with pytest.raises(UserError, match=f"model 'some/model' is no folder, and only these are known .*{SD35_MEDIUM}"):
        find_architecture("some/model")


def test_a_damaged_folder_is_named(tmp_path: Path, random_pipeline: Path) -> None:
    shutil.copytree(random_pipeline, tmp_path / "model")
    (tmp_path / "model" / "vae" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"vae/config\.json: not a JSON object"):
        read_architecture(tmp_path / "model")


def test_text_encoders_without_tokenizers_are_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Z-Image's 6 B weights would take minutes first."""
    family = make_family(find_architecture("Tongyi-MAI/Z-Image"))
    monkeypatch.setattr(type(family), "build_transformer", lambda self: pytest.fail("was built"))
    with pytest.raises(UserError, match=r"^--random-text-encoders: the tokenizer of text_encoder of Tongyi-MAI"):
        random_pipeline(family, device=CPU, dtype=torch.float32, seed=0, text_encoders=True)
