"""The files in examples/ do what the pages that show them say."""

import re
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dgpo_kernels import philox_normal

from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.models.forward import predict
from dgpo_fast.objectives.levels import draw_training_steps
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import load_rewards
from dgpo_fast.run.metrics import read_metrics
from dgpo_fast.seeds import stream_seed
from dgpo_fast.tiny.data import all_prompts
from dgpo_fast.train import train
from tests.objective_case import GROUPS, SIZE, Case, make_config
from tests.processes import run_alone

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SMALL = [
    *("--rollout.groups=2", "--rollout.group-size=4", "--rollout.num-inference-steps=2"),
    *("--evaluation.images=2", "--evaluation.num-inference-steps=2", "--policy.micro-batch=3"),
]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def example(name: str) -> str:
    return (EXAMPLES / name).read_text(encoding="utf-8")


def test_the_pages_show_the_files() -> None:
    assert f"```python\n{example('my_reward.py')}```" in page("rewards.md")
    assert f"```yaml\n{example('my_recipe.yaml')}```" in page("recipes.md")
    assert f":\n\n{textwrap.indent(example('my_prompts.txt'), '    ')}\n" in page("prompts.md")
    assert "(../examples/my_objective.py)" in page("objectives.md")


def test_all_of_them_train_together_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started in a fresh process in examples/, as a user starts it: own recipe, prompts and reward, own objective."""
    [objective] = re.findall(r"python -m dgpo_fast.train (--objective my_objective:.*)", page("objectives.md"))
    args = ["my_recipe.yaml", *objective.split(), "--iterations=2", *SMALL, f"--runs-dir={tmp_path}", "--name=mine"]
    monkeypatch.chdir(EXAMPLES)
    run_alone(["-m", "dgpo_fast.train", *args])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert train(["--resume", str(tmp_path / "mine"), "--iterations", "3"]) == 0
    lines = read_metrics(tmp_path / "mine/metrics.jsonl")
    assert len(lines) == 3 and all(line["loss"] > 0 for line in lines)
    assert {"reward/jpeg_mean", "reward/bright_mean", "reward/bright/too_bright_mean"} <= lines[0].keys()


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    commands = re.findall(r"^python -m dgpo_fast\.train ([^#\n]*)", example("README.md"), re.MULTILINE)
    configs = [configure(command.split()) for command in commands]
    assert [config.prompts for config in configs] == ["my_prompts.txt", "tiny-shapes", "tiny-shapes"]
    assert configs[1].rewards == ("my_reward:Brightness",)
    assert f"--objective {configs[2].objective} " in page("objectives.md")


@pytest.mark.parametrize("micro_batch", [1, 5, GROUPS * SIZE])
def test_the_gradient_of_my_objective_is_that_of_its_loss(
    micro_batch: int, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of exp(advantage)·|v − (ε − x0)|², written out over all samples: the same at any micro-batch."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    case = Case(random_pipeline, replace(make_config(), objective="my_objective:RewardWeighted"))
    batch = case.batch
    [step] = draw_training_steps(batch.iteration, count=1, among=batch.schedule.steps, seed=case.config.seed)
    sigma, timestep = batch.schedule.sigmas[step], batch.schedule.timesteps[step]
    seed = stream_seed(case.config.seed, "training noise")
    noise = philox_normal(batch.x0.shape[1:], batch.group_index, seed=seed, draw=batch.iteration)
    policy_v = predict(case.models.policy, (1 - sigma) * batch.x0 + sigma * noise, timestep, batch.text)
    error = (policy_v - (noise - batch.x0)).square().mean((1, 2, 3))
    loss = (torch.exp(batch.advantage) * error).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.models.weights.values()))])
    found, metrics = case.gradient(micro_batch)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)


def test_my_reward_prefers_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert len(example("my_reward.py").splitlines()) <= 10
    reward = load_rewards(["my_reward:Brightness"])
    images = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    scores = reward.score_groups(images, [Prompt("a bright room")], 2)
    assert scores.valid.all() and not scores.failures and scores.rewards[0, 0] < scores.rewards[0, 1]


def test_my_prompts_are_of_the_small_pipeline_s_world() -> None:
    assert set(example("my_prompts.txt").splitlines()) <= {text for text, _ in all_prompts()}


def test_my_recipe_is_read_as_its_page_says(tmp_path: Path) -> None:
    """What it sets, what the command line changes, and the error that a misspelt setting gives."""
    file = str(EXAMPLES / "my_recipe.yaml")
    config = configure([file])
    assert (config.recipe, config.rollout.groups, config.optimizer.lr) == ("tiny-shapes", 8, 1e-4)
    assert configure([file, "--optimizer.lr", "3e-4", "--name", "faster"]).optimizer.lr == 3e-4
    misspelt = tmp_path / "my_recipe.yaml"
    misspelt.write_text(example("my_recipe.yaml").replace("groups:", "group:"))
    with pytest.raises(UserError) as caught:
        configure([str(misspelt)])
    assert f"error: {caught.value}".replace(str(misspelt), "my_recipe.yaml") in page("recipes.md")
