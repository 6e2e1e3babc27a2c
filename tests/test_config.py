"""Settings: recipes carry the released values, and every mistake is one line that names it."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.config.command_line import configure, take_option
from dgpo_fast.config.options import Config, Optimizer
from dgpo_fast.config.reading import flat, parse_overrides, resolve, to_dict, write_yaml
from dgpo_fast.config.recipes import RECIPES, get_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.learning.learner import learning_rate


def test_released_values() -> None:
    """The table of the release, recipe by recipe."""
    table = {
        # recipe: (G, P, guidance, beta, kl_weight, kl_cfg, clip, M, first steps, std, switch, reference, eval steps)
        "sd35m-geneval": (16, 8, 4.5, 100, 0.02, 1.0, 1e-2, 4, 5, "group", 500, "frozen", 14),
        "sd35m-ocr": (16, 8, 4.5, 100, 0.02, 1.0, 1e-2, 4, 7, "global", 200, "frozen", 14),
        "sd35m-pickscore": (24, 8, 4.5, 10, 0.001, 1.0, 5e-2, 4, 7, "global", 200, "frozen", 14),
        "sd35m-cfgfree": (16, 8, 1.0, 100, 0.02, 4.5, 1e-2, 4, 5, "group", 500, "frozen", 10),
        "sd35m-cfgfree-ema": (16, 8, 1.0, 2000, 0.001, 1.0, 1e-2, 4, 5, "group", 500, "ema", 10),
    }
    for name, values in table.items():
        c = get_recipe(name)
        found = (
            c.rollout.group_size,
            c.rollout.groups,
            c.rollout.guidance_scale,
            c.dgpo.beta,
            c.dgpo.kl_weight,
            c.dgpo.kl_guidance_scale,
            c.dgpo.clip_range,
            c.dgpo.timesteps,
            c.dgpo.high_noise_steps,
            c.advantage.std,
            c.ema.switch_ema_ref,
            c.dgpo.reference,
            c.evaluation.num_inference_steps,
        )
        assert found == values, name
        shared = (c.optimizer.lr, c.optimizer.weight_decay, c.policy.lora_rank, c.policy.lora_alpha, c.rollout.shift)
        assert shared == (3e-4, 1e-4, 64, 128.0, 3.0), name
        assert (c.rollout.num_inference_steps, c.rollout.resolution) == (10, 512), name
        assert (c.dgpo.guided_reference, c.dgpo.training_sigma) == (True, "timestep"), name


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-flow-grpo")])
def test_gradient_of_flow_grpo(name: str) -> None:
    """The recipes of the release's values have its gradient too; the small ones have our own."""
    assert get_recipe(name).flow_grpo.unconditional_gradient is name.startswith("tiny-")


def test_released_values_of_the_regressions() -> None:
    """Those that their sources give, recipe by recipe: G, P, steps, guidance, m or β, KL weight, levels, lr."""
    table = {
        "sd35m-geneval-nft": (24, 48, 10, 1.0, 1.0, 1e-4, None, 1),
        "sd35m-ocr-nft": (24, 48, 10, 1.0, 0.1, 1e-4, None, 2),
        "sd35m-pickscore-nft": (24, 48, 10, 1.0, 1.0, 1e-4, None, 1),
        "sd35m-geneval-awm": (24, 72, 14, 1.0, 1.0, 0.001, 6, 1),
        "sd35m-ocr-awm": (24, 72, 14, 1.0, 1.0, 0.003, 6, 1),
        "sd35m-pickscore-awm": (24, 72, 14, 1.0, 1.0, 0.0001, 6, 1),
        "sd35m-geneval-ram": (24, 48, 20, 4.5, 100.0, None, 8, 1),
        "sd35m-ocr-ram": (24, 48, 20, 4.5, 100.0, None, 8, 1),
        "sd35m-pickscore-ram": (24, 48, 20, 4.5, 1000.0, None, 8, 1),
        "sd35m-ocr-crd": (24, 48, 10, 1.0, 1.0, 0.1, None, 2),
    }
    for name, values in table.items():
        c = get_recipe(name)
        settings = getattr(c, c.objective)
        found = (
            c.rollout.group_size,
            c.rollout.groups,
            c.rollout.num_inference_steps,
            c.rollout.guidance_scale,
            {"awm": "ema_weight", "ram": "multiplier"}.get(c.objective, "beta"),
            getattr(settings, "kl_weight", None),
            settings.timesteps,
            getattr(settings, "optimizer_steps", 1),
        )
        assert (*found[:4], getattr(settings, found[4]), *found[5:]) == values, name
        assert (c.optimizer.lr, c.optimizer.weight_decay, c.advantage.std) == (3e-4, 1e-4, "global"), name


@pytest.mark.parametrize(("decay", "halfway"), [("none", 0.2), ("linear", 0.1), ("cosine", 0.1)])
def test_learning_rate(decay: Literal["none", "linear", "cosine"], halfway: float) -> None:
    """It starts where the setting says and falls towards 0, never below, whatever a resumed run's length."""
    settings = Optimizer(lr=0.2, lr_decay=decay)
    assert learning_rate(settings, 0, 10) == 0.2
    assert learning_rate(settings, 5, 10) == pytest.approx(halfway)
    assert 0 < learning_rate(settings, 9, 10) <= 0.2
    assert learning_rate(settings, 12, 10) == (0.2 if decay == "none" else 0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    """What a run writes as config.yaml is what it was."""
    config = get_recipe(name)
    assert config.recipe == name
    write_yaml(config, tmp_path / "config.yaml")
    assert configure([str(tmp_path / "config.yaml")]) == config


def test_command_line_overrides_yaml_overrides_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: tiny-ocr\niterations: 7\noptimizer: {lr: 1e-5, eps: 1e-6}\n")
    overrides = ["--optimizer.lr", "0.5", "--rewards", "jpeg", "my:Own=2", "--dgpo.clip-range", "none"]
    config = configure([str(file), *overrides])
    assert (config.recipe, config.iterations, config.optimizer.eps, config.optimizer.lr) == ("tiny-ocr", 7, 1e-6, 0.5)
    assert (config.rewards, config.dgpo.clip_range) == (("jpeg", "my:Own=2"), None)
    assert config.prompts == get_recipe("tiny-ocr").prompts


def test_dotted_names_in_a_file_are_settings_too(tmp_path: Path) -> None:
    """As errors and --help print them, beside groups, and each setting once."""
    file = tmp_path / "mine.yaml"
    file.write_text("rollout.groups: 3\nrollout: {group_size: 5}\noptimizer.lr: 0.5\n")
    config = configure([str(file), "--optimizer.eps", "1e-6"])
    assert (config.rollout.groups, config.rollout.group_size) == (3, 5)
    assert (config.optimizer.lr, config.optimizer.eps) == (0.5, 1e-6)


def test_one_reward_in_a_file_needs_no_list(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rewards: red=redness:Redness\n")
    assert configure([str(file)]).rewards == ("red=redness:Redness",)


ON_THE_COMMAND_LINE = {
    "--optimizer.learning-rate 1": "command line: unknown setting 'optimizer.learning_rate': "
    "did you mean 'optimizer.lr'?",
    "tiny-shape": "unknown recipe 'tiny-shape': did you mean 'tiny-shapes'?",
    "--iteration 3": "command line: unknown setting 'iteration': did you mean 'iterations'?",
    "--groups 3": "command line: unknown setting 'groups': did you mean 'rollout.groups'?",
    "--rolout.groups 3": "command line: unknown setting 'rolout': did you mean 'rollout'?",
    "--rollout.group-size 1": "command line: rollout.group_size: input should be greater than or equal to 2, not '1'",
    "--optimizer.lr fast": "command line: optimizer.lr: input should be a valid number, "
    "unable to parse string as a number, not 'fast'",
    "--optimizer.lr nan": "command line: optimizer.lr: input should be a finite number, not 'nan'",
    "--precision fp8": "command line: precision: input should be 'auto', 'fp32' or 'bf16', not 'fp8'",
    "--policy.base-precision fp4": "command line: policy.base_precision: input should be 'same', 'int8' or 'nf4', "
    "not 'fp4'",
    "--policy.base-precision nf4 --policy.train full": "command line: policy.base_precision is nf4 but policy.train is "
    "full: only a frozen base is quantised; use --policy.train lora",
    "--policy.train lora --policy.base-precision int8 --engine.rollout-precision fp8": "command line: "
    "policy.base_precision is int8 but engine.rollout_precision is fp8: weights would be rounded twice; use "
    "--engine.rollout-precision same",
    "--reward-workers many": "command line: reward_workers: input should be 'auto' or a valid integer, "
    "unable to parse string as an integer, not 'many'",
    "--reward-workers -1": "command line: reward_workers: input should be 'auto' or greater than or equal to 0, "
    "not '-1'",
    "--iterations": "command line: --iterations has no value",
    "--iterations 3 4": "command line: --iterations takes one value, not 2",
    "tiny-ocr extra": "command line: unexpected 'extra': settings are given as --name value",
    "--rollout 3": "command line: 'rollout' is a group of settings; name one of them, as in 'rollout.group_size'",
    "--dgpo.timesteps 8": "command line: dgpo.timesteps is 8 but only 7 timesteps can be drawn "
    "(rollout.num_inference_steps, dgpo.high_noise_steps): lower it or raise those",
    "tiny-ocr --recipe tiny-shapes": "command line: two recipes, tiny-ocr and tiny-shapes: give one",
    "nothing.yaml": f"nothing.yaml: no such file: check the path (the working folder is {Path.cwd()})",
}
IN_A_FILE = {
    "iterations: 3\nbeta: 10\n": "unknown setting 'beta': did you mean 'dgpo.beta'?",
    "iterations: [3\n": " line 2: not valid YAML: expected ',' or ']', but got '<stream end>'",
    "iterations: 3\noptimizer: {lr: 1}\niterations: 4\n": " line 3: not valid YAML: 'iterations' is given twice",
    "optimizer:\n  lr: 1\n  lr: 2\n": " line 3: not valid YAML: 'lr' is given twice",
    "rollout.groups: 3\nrollout: {groups: 4}\n": ": 'rollout.groups' is given twice",
    "rolout.groups: 3\n": ": unknown setting 'rolout.groups': did you mean 'rollout.groups'?",
    "rollout.group: 3\n": ": unknown setting 'rollout.group': did you mean 'rollout.groups'?",
    "rewards: {jpeg: 0.1}\n": ": rewards: write rewards: [jpeg=0.1, red=my_reward:Name], not {'jpeg': 0.1}",
    "rewards: [jpeg: 0.1]\n": ": rewards: write rewards: [jpeg=0.1, red=my_reward:Name], not [{'jpeg': 0.1}]",
    "rewards: []\n": ": rewards: write rewards: [jpeg=0.1, red=my_reward:Name], not []",
    "recipe: mine.yaml\n": ": recipe 'mine.yaml': only a shipped recipe may stand there, such as tiny-shapes; ",
    "recipe: tiny-shape\n": ": unknown recipe 'tiny-shape': did you mean 'tiny-shapes'?",
    "- 1\n": "settings must be `key: value` lines, not a list",
    "iterations: many\n": "iterations: input should be a valid integer, "
    "unable to parse string as an integer, not 'many'",
    "seed: !!python/object/apply:os.system ['true']\n": " line 1: not valid YAML: could not determine a constructor",
}


@pytest.mark.parametrize("line", ON_THE_COMMAND_LINE)
def test_mistakes_on_the_command_line(line: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(line.split())
    assert str(caught.value) == ON_THE_COMMAND_LINE[line]


@pytest.mark.parametrize("text", IN_A_FILE)
def test_mistakes_in_a_file(text: str, tmp_path: Path) -> None:
    """The message names the file; a tag that would make YAML run code is refused."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        configure([str(file)])
    assert str(caught.value).startswith(str(file))
    assert IN_A_FILE[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.sampled_from(list(flat(Config()))), st.text(max_size=12))
def test_any_value_is_taken_or_refused_in_one_line(name: str, value: str) -> None:
    """No text given for any setting escapes as another exception."""
    try:
        config = resolve(Config(), parse_overrides([f"--{name}={value}"]), "command line")
    except UserError as error:
        assert "command line" in str(error)
    else:
        assert to_dict(config) == to_dict(resolve(Config(), to_dict(config), "again"))


def test_take_option() -> None:
    args = ["a", "--resume", "runs/x", "--seed", "1"]
    assert (take_option(args, "resume"), args) == ("runs/x", ["a", "--seed", "1"])
    assert (take_option(args, "resume"), take_option(["--resume=r"], "resume")) == (None, "r")


def test_importing_is_light() -> None:
    """A fresh process imports the package without what takes a tenth of a second or more."""
    heavy = {"torch", "diffusers", "transformers", "peft", "triton", "bitsandbytes", "scipy", "matplotlib"}
    code = f"import dgpo_fast, dgpo_fast.train, sys; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_none_is_a_value_or_no_value() -> None:
    """On the command line "none" is the word that a setting knows by it, and no value where it knows none."""
    overrides = parse_overrides(["--optimizer.lr-decay", "none", "--rollout.resolution", "none"])
    assert overrides == {"optimizer": {"lr_decay": "none"}, "rollout": {"resolution": None}}
    assert resolve(Config(), overrides, "command line").rollout.resolution is None
