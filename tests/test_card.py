"""`--card`: the settings with which a run fits, by prediction at full size; and training at a smaller size."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import cards as benchmark
from benchmarks.pages import PERFORMANCE, part
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Config
from dgpo_fast.engine.batches import batch_sizes
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.memory.__main__ import memory
from dgpo_fast.memory.card import (
    BELOW_A_GROUP,
    SAVINGS,
    on_card,
    plan_card,
    smaller_sizes,
    with_low_memory,
    with_savings,
)
from dgpo_fast.memory.predict import Predictor
from dgpo_fast.models.loading import read_model
from dgpo_fast.models.own_settings import in_plain_numbers, sizes_note
from dgpo_fast.rollout.draw import run_draws
from dgpo_fast.train import train
from tests.runs import untimed
from tests.sd3 import family_in

GIB = 2**30


@pytest.mark.parametrize("recipe", ["sd35m-ocr", "flux2-klein-base-4b-ocr", "z-image-ocr"])
def test_full_size_models_fit_small_cards(recipe: str) -> None:
    """On 24 GB and 16 GB, with the settings of the committed plan: below what may be used, each number as committed,
    and the sum of the parts is the peak."""
    rows = [row for row in json.loads(benchmark.RESULT.read_text(encoding="utf-8")) if row["recipe"] == recipe]
    assert [row["card_gb"] for row in rows] == [16, 24]
    config = configure([recipe, "--random-weights"])
    alone = Predictor(read_model(config), torch.bfloat16)
    for row in rows:
        predictor, available = on_card(alone, row["card_gb"] * GIB)
        taken = {taken["saving"] for taken in row["taken"]}
        chosen = with_savings(config, [saving for saving in SAVINGS if str(saving) in taken])
        prediction = predictor.predict(chosen, row["micro_batch"])
        assert prediction.peak <= available == row["available_gib"] * GIB
        assert prediction.peak / GIB == pytest.approx(row["peak_gib"], rel=1e-3)
        assert row["peak_gib"] == pytest.approx(row["phase_gib"] + sum(row["held_gib"].values()))
        assert all(one["saves_gib"] > 0 for one in row["taken"])
        assert row["micro_batch"] >= 16 or str(BELOW_A_GROUP) in taken


def test_the_page_has_the_committed_table() -> None:
    """Of every recipe, on both cards; INEXACT savings are labelled in it."""
    rows = json.loads(benchmark.RESULT.read_text(encoding="utf-8"))
    table = benchmark.table(rows)
    assert part("cards", PERFORMANCE) == table
    assert len(rows) == 2 * len(benchmark.RECIPES) == table.count("\n") - 1
    assert table.count("**inexact** `--policy.base-precision") == sum(
        any("base-precision" in taken["saving"] for taken in row.get("taken", ())) for row in rows
    )


@pytest.fixture(scope="module")
def small(random_pipeline: Path) -> tuple[Predictor, Config]:
    """A small model for which every kind of saving matters, and its run."""
    settings = [
        "--policy.train",
        "lora",
        "--policy.lora-rank",
        "4",
        "--rollout.resolution",
        "32",
        "--rollout.groups",
        "2",
    ]
    settings += ["--rollout.group-size", "4", "--rollout.max-sequence-length", "9", "--dgpo.kl-guidance-scale", "1"]
    predictor = Predictor(family_in(random_pipeline), torch.bfloat16, graphs=False)
    return predictor, configure(["tiny-shapes", *settings])


def least(predictor: Predictor, config: Config, *precision: str) -> int:
    """The peak with all exact savings, micro-batches of one, and a base in another precision if one is given."""
    exact = with_savings(config, [saving for saving in SAVINGS if saving.exact or saving.value in precision])
    return predictor.predict(exact, 1).peak


def test_exact_savings_come_first(small: tuple[Predictor, Config]) -> None:
    """The fewest that are enough: none, exact ones, then INEXACT ones, 8 bits before 4; each is told with its cost."""
    predictor, config = small
    whole = predictor.predict(config, config.rollout.group_size).peak
    plans = [
        plan_card(predictor, config, available)
        for available in (
            int(1.1 * whole),
            int(0.9 * whole),
            int(1.02 * least(predictor, config)),
            int(1.01 * least(predictor, config, "int8")),
        )
    ]
    assert plans[0].taken == () and "Chosen: nothing: it fits as it is" in plans[0].lines()[0]
    for plan in plans:
        assert plan.prediction.peak <= plan.available
        assert plan.config.rollout.resolution == config.rollout.resolution, "never taken"
        assert [one.saving for one in plan.taken] == [one for one in SAVINGS if one in {t.saving for t in plan.taken}]
        for taken in plan.taken:
            assert taken.saves > 0 and f"{taken.saving} ({taken.saving.costs}): saves " in plan.lines()[0]
            rest = [one.saving for one in plan.taken if one is not taken]
            others = predictor.predict(with_savings(config, rest), plan.config.policy.micro_batch_size)
            assert others.peak > 0.98 * plan.available or taken.saving is BELOW_A_GROUP, "none is needless"
    for plan in plans[1:3]:
        assert plan.taken and all(taken.saving.exact for taken in plan.taken) and plan.proposed is None
    assert plans[3].config.policy.base_precision in ("same", "int8")
    assert any(taken.saving.costs.startswith("INEXACT: ") for taken in plans[3].taken)
    if plans[3].proposed:
        assert (
            plans[3].lines()[-1]
            == f"--rollout.resolution {plans[3].proposed} is predicted to fit without INEXACT savings"
        )


def test_what_nothing_fits_is_one_line(small: tuple[Predictor, Config]) -> None:
    predictor, config = small
    with pytest.raises(UserError) as caught:
        plan_card(predictor, config, predictor.predict(config, 1).held["base weights"] // 8)
    line = str(caught.value)
    assert line.startswith("card: with all savings, even INEXACT ones, this run needs ") and "\n" not in line
    assert line.endswith("may be used; use a larger card or a smaller model")


def test_a_smaller_size_is_proposed(small: tuple[Predictor, Config]) -> None:
    """Where whole images do not fit at all, and the largest of those that do."""
    predictor, config = small
    available = least(predictor, replace(config, rollout=replace(config.rollout, resolution=24)), "int8", "nf4")
    assert available < least(predictor, config, "int8", "nf4") and smaller_sizes(predictor.family, config) == [
        "24",
        "16",
    ]
    with pytest.raises(UserError, match=r"may be used; --rollout.resolution (24|16) is predicted to fit$"):
        plan_card(predictor, config, available)


def test_low_memory_takes_all_exact_savings() -> None:
    low = with_low_memory(configure(["sd35m-ocr", "--low-memory"]))
    for saving in SAVINGS:
        if saving.exact and saving.setting:
            assert saving.applied(low) is None, "is there already"
    assert low.policy.micro_batch == "auto" and low.policy.base_precision == "same"
    assert (
        with_low_memory(configure(["sd35m-ocr", "--low-memory", "--rollout.batch-size", "4"])).rollout.batch_size == 4
    )


def test_full_fine_tuning_keeps_its_base(small: tuple[Predictor, Config]) -> None:
    """Savings of a LoRA's base are none there."""
    predictor, config = small
    whole = replace(config, policy=replace(config.policy, train="full"))
    for saving in SAVINGS:
        if saving.setting in ("policy.behaviour", "policy.base_precision"):
            assert saving.applied(whole) is None and saving.applied(config) is not None
    plan = plan_card(predictor, whole, least(predictor, whole, "adamw8bit"))
    assert plan.config.optimizer.name == "adamw8bit" and plan.config.policy.base_precision == "same"


def test_a_run_keeps_what_was_chosen(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says so, its config.yaml has the settings and no card, and it is resumed with them."""
    assert train(["small.yaml", "--iterations", "1", "--card", "24gb", "--name", "run"]) == 0
    said = capsys.readouterr().out
    assert "card 24GB: 21.8 GiB may be used. Chosen: nothing: it fits as it is\n" in said
    kept = yaml.safe_load(Path("runs/run/config.yaml").read_text())
    assert kept["card"] is None and kept["policy"]["base_precision"] == "same"
    assert train(["--resume", "runs/run", "--iterations", "2"]) == 0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            "RTX4090",
            "command line: card: write the memory of the card, as 24GB, or auto for the GPU that is here, not ",
        ),
        ("0GB", "command line: card: write the memory of the card, as 24GB, or auto for the GPU that is here, not "),
        ("auto", "card auto: this run is on a CPU; name a card's memory, as --card 24GB"),
    ],
)
def test_an_unknown_card_is_one_line(given: str, line: str, workspace: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(["small.yaml", "--card", given])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert not Path("runs").exists()


def test_one_card_on_the_command_line(random_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["tiny-shapes", "--model", str(random_pipeline), "--rollout.max-sequence-length", "9"]
    assert memory([*model, "--policy.train", "lora", "--card", "24GB"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("21.8 GiB may be used. Chosen: nothing: it fits as it is\npredicted memory ")
    with pytest.raises(UserError, match=r"^card auto: nothing is loaded here; name a card's memory, as --card 24GB$"):
        memory([*model, "--card", "auto"])


SIZES = ["--rollout.resolution", "16", "--evaluation.resolution", "32x24"]
SMALL = ["small.yaml", *SIZES, "--engine.attention", "native", "--engine.linear", "torch"]


def test_trained_small_and_evaluated_large(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Groups and evaluations each at their size; the run says so, and is resumed to the same end."""
    assert train([*SMALL, "--iterations", "3", "--name", "whole"]) == 0
    said = capsys.readouterr().out
    assert (
        "trained at 16 × 16 pixels (16 image tokens, shift 3), evaluated at 32 high, 24 wide (48 image tokens, shift "
        "3): the gain is what carries over to that size\n"
    ) in said
    assert train([*SMALL, "--iterations", "2"]) == 0
    assert train(["--resume", "runs/run", "--iterations", "3"]) == 0
    assert untimed(Path("runs/run")) == untimed(Path("runs/whole"))
    assert Evaluation.load(Path("runs/run/evaluation_after.npz")).images.shape[1:] == (32, 24, 3)
    with pytest.raises(UserError, match=r"'evaluation.resolution' cannot change within a run"):
        train(["--resume", "runs/run", "--evaluation.resolution", "16"])


def test_each_size_has_its_own_grid_batch_and_memory(random_pipeline: Path) -> None:
    """A shift that depends on the size is that of each; a forward of evaluations has the pixels of a rollout's."""
    config = configure(["z-image-ocr", "--random-weights", "--evaluation.resolution", "1024"])
    family = read_model(config)
    plain = in_plain_numbers(config, family)
    assert (plain.rollout.resolution, plain.evaluation.resolution) == (512, 1024)
    sizes = batch_sizes(replace(plain, policy=replace(plain.policy, micro_batch=8)), 1)
    assert sizes.evaluation * 4 == sizes.rollout
    draws = run_draws(config, family, torch.device("cpu"), sizes.rollout, sizes.evaluation)
    sigmas = [draw.schedule.timesteps / 1000 for draw in draws]
    assert not np.allclose(sigmas[0][1] / sigmas[0][0], sigmas[1][1] / sigmas[1][0])
    assert sizes_note(replace(config, evaluation=replace(config.evaluation, resolution=512)), family) == ""
    same = replace(config, evaluation=replace(config.evaluation, resolution=None))
    small = configure(["tiny-shapes", "--rollout.resolution", "16"])
    predictor = Predictor(family_in(random_pipeline), torch.float32)
    large = replace(small, evaluation=replace(small.evaluation, resolution=64))
    phases = [predictor.predict(of, 4).phases for of in (small, large)]
    assert "evaluation" not in phases[0] and phases[1]["evaluation"] > 0
    assert same.evaluation_resolution == 512


@pytest.mark.parametrize("setting", ["rollout", "evaluation"])
def test_a_size_that_cannot_be_drawn_is_named(setting: str, workspace: Path) -> None:
    line = rf"^{setting}.resolution 18: this model draws multiples of 4 up to 64 pixels; the nearest: 16 or 20$"
    with pytest.raises(UserError, match=line):
        train(["small.yaml", f"--{setting}.resolution", "18"])
    with pytest.raises(UserError, match=rf"^command line: {setting}.resolution: write HEIGHTxWIDTH in pixels"):
        train(["small.yaml", f"--{setting}.resolution", "large"])
    assert not Path("runs").exists()
