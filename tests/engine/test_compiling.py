"""Compiled blocks: whole graphs, and none compiled after the first iteration."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dgpo_fast.engine import compile
from dgpo_fast.engine.compile import StaticBatches
from dgpo_fast.models.family import family_of
from dgpo_fast.models.forward import predict
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.registry import load_objective
from tests.engine.cases import GROUPS, SIZE, EngineCase, make_config
from tests.sd3 import stand_in

OBJECTIVES = ["dgpo", "diffusion_dpo", "flow_grpo", "flow_grpo, detached"]
SHARED = "dgpo with one row a group"


@pytest.mark.parametrize("objective", [*OBJECTIVES, SHARED])
def test_nothing_is_compiled_after_the_first_iteration(
    objective: str, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other prompts, draws, weights and numbers of preferring groups; partial last batches of every kind."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager" if objective == "dgpo" else "eager")
    monkeypatch.setattr(compile, "BACKEND", counter)
    savings = {"compile": "on", "batch_timesteps": True, "skip_equal_groups": True}
    savings |= {"share_first_level": "on" if objective == SHARED else "off"}
    case = EngineCase(random_pipeline, make_config(objective="dgpo" if objective == SHARED else objective, **savings))
    loaded, batch = load_objective(case.config), case.batch()
    for iteration, preferring in enumerate((2, 3, 1)):
        with torch._dynamo.config.patch(error_on_recompile=iteration > 0):
            case.rollout([["a cat"], ["big red car", "a dog"], ["two birds"]][iteration], number=iteration)
            advantage = torch.where(torch.arange(12) < 4 * preferring, batch.advantage + 1.0, 0.0)
            text = case.encoder(["a dog", "a big house", "a car"][iteration:] * 12)[slice(0, 12)]
            changed = replace(batch, iteration=iteration, advantage=advantage, text=text, x0=batch.x0 + iteration)
            loaded.accumulate(changed, case.models, case.old)
            case.models.load_weights({name: weight * 1.1 for name, weight in case.new.items()})
        if iteration == 0:
            compiled = counter.frame_count
    assert counter.frame_count == compiled
    # Kinds of blocks (2) × (pairs of the rollout, and of the base where it is guided; partial pairs, and single
    # predictions of frozen weights; the policy's micro-batch, of pairs where it is guided).
    # With one row a group, also the policy's rows of three groups; batches of frozen weights are full.
    # With a constant unconditional velocity, also the policy's batch of those.
    # Diffusion-DPO's frozen weights predict as many rows as a rollout's forward has.
    kinds = {SHARED: 4, "flow_grpo, detached": 4, "diffusion_dpo": 2}
    assert compiled == 2 * kinds.get(objective, 3)


def test_a_batch_is_padded_to_what_is_compiled() -> None:
    batches = StaticBatches([8, 16], training=[4])
    assert [batches.padded(rows) for rows in (1, 4, 5, 9, 16, 17)] == [4, 4, 5, 9, 16, 17]
    with torch.no_grad():
        assert [batches.padded(rows) for rows in (1, 8, 9, 16, 17)] == [8, 8, 16, 16, 17]


class Scaled(torch.nn.Module):
    """Multiplies a row by its timestep."""

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: object
    ) -> tuple[torch.Tensor]:
        self.rows = len(encoder_hidden_states)
        return (hidden_states * timestep[:, None],)


def test_padding_is_seen_neither_in_the_output_nor_in_the_gradient() -> None:
    module = stand_in(Scaled())
    StaticBatches([], training=[4]).attach(module)
    x, scale = torch.arange(6.0).reshape(3, 2).requires_grad_(), torch.tensor([1.0, 2.0, 3.0])
    text = TextEmbeds.of_samples({"prompt": torch.zeros(3, 1), "pooled": torch.zeros(3, 1)})
    out = predict(module, x, scale, text)
    out.sum().backward()
    assert module.rows == 4 and torch.equal(out, x * scale[:, None])
    assert torch.equal(x.grad, scale[:, None].expand(3, 2))
    with pytest.raises(RuntimeError):
        predict(module, x, scale[:2], text)
    assert len(predict(module, x, scale, text)) == 3, "and works again"


@pytest.mark.parametrize("kind", ["blocks", "selective"])
def test_a_checkpointed_block_is_compiled_whole(kind: str, random_pipeline: Path) -> None:
    """With the same gradient as one that is only checkpointed; all samples at once, so that it is compiled once."""
    torch._dynamo.reset()
    config = make_config(checkpointing=kind)
    config = replace(config, policy=replace(config.policy, micro_batch=GROUPS * SIZE))
    case = EngineCase(random_pipeline, config)
    _, plain = case.gradient()
    block = family_of(case.models.policy).blocks(case.models.policy)[0]
    block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    _, compiled = case.gradient()
    assert torch.linalg.norm(compiled - plain) <= 1e-5 * torch.linalg.norm(plain)
