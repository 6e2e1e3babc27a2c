"""Runs on preferences: made by hand from what docs/preferences.md says, killed and resumed, and with bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.config.objective_options import Advantage
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.rewards.group_log import joined
from dgpo_fast.rollout.judged import encode_picture
from dgpo_fast.run.checkpoint import load_newest
from dgpo_fast.train import train
from dgpo_fast.trainer import Trainer
from tests.runs import untimed
from tests.texts import message

SIDE = 16
ARGS = ["small.yaml", "--data.source=preferences", "--data.preferences=votes", "--iterations=4"]


def paint(path: Path, number: int, height: int = SIDE, width: int = SIDE) -> str:
    """A picture like no other, by its name in the folder of votes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path.name


def vote(folder: Path, *lines: dict) -> None:
    with (folder / "preferences.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def votes(workspace: Path) -> Path:
    """Ten prompts with pictures that were judged in all ways, in groups of two, three and five."""
    folder = workspace / "votes"
    number = iter(range(999))

    def picture() -> str:
        drawn = next(number)
        return paint(folder / f"{drawn}.png", drawn)

    for prompt in (workspace / "prompts.txt").read_text().splitlines()[:9]:
        for kind, count in (("rating", 5), ("rank", 3)):
            vote(folder, *({"prompt": prompt, "image": picture(), kind: place} for place in range(1, count + 1)))
        vote(folder, {"prompt": prompt, "win": picture(), "lose": picture()})
        vote(folder, *({"prompt": prompt, "image": picture(), "like": like} for like in (True, False)))
    return folder


def test_a_run_on_all_kinds_of_judgements(votes: Path) -> None:
    """Resumed from its first checkpoint it has the metrics and weights of the run that was left alone. Pictures are
    encoded once; the agreement with what is held out is measured during the run and at its end."""
    args = [*ARGS, "--evaluation.every=2", "--data.noise-passes=1", "--rollout.groups=16"]
    assert train([*args, "--name", "undisturbed"]) == 0
    ours, theirs = votes.parent / "runs/resumed", votes.parent / "runs/undisturbed"
    shutil.copytree(theirs, ours)
    for number in (2, 3, 4):
        shutil.rmtree(ours / f"checkpoints/iteration-{number:06d}")
    assert train(["--resume", "runs/resumed"]) == 0
    assert untimed(ours) == untimed(theirs)
    state, other = (load_newest(folder / "checkpoints")[0].tensors for folder in (ours, theirs))
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    summary = json.loads((theirs / "summary.json").read_text())
    held_out = summary["held_out_preferences"]
    assert summary["source"] == "preferences"
    assert held_out["prompts"] == 1 and held_out["pairs"] == 10 + 3 + 1 + 1
    assert 0 <= held_out["accuracy"] <= 1 and (held_out["liked"], held_out["disliked"]) == (1, 1)
    lines = untimed(theirs)
    assert all(0 <= line["heldout_accuracy"] <= 1 for line in lines if line["iteration"] % 2 == 0)
    assert len(list((theirs / "latents").iterdir())) == 9 * 12


def test_a_run_on_liked_and_disliked_folders(workspace: Path) -> None:
    """Single pictures of different prompts, as the page shows them; another run reads what was encoded."""
    for number in range(12):
        side = workspace / "votes" / ("liked" if number % 3 else "disliked")
        paint(side / f"{number}.png", number)
        (side / f"{number}.txt").write_text(f"picture {number}")
    args = [
        *ARGS,
        "--objective=kto",
        "--kto.timesteps=2",
        "--data.folder=encoded",
        "--kto.beta=1000",
        "--rollout.groups=10",
    ]
    assert train([*args, "--name", "first"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("encoded").iterdir()}
    assert train([*args, "--name", "second", "--seed", "3", "--policy.micro-batch=2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("encoded").iterdir()} == before
    assert len(before) == 12
    first = untimed(workspace / "runs/first")
    assert first[0]["loss"] == pytest.approx(0.5, rel=1e-3), "the policy is the base"
    assert first[-1]["loss"] < 0.5
    assert first[-1]["dsm_gap_liked"] < first[-1]["dsm_gap_disliked"]


def batches_of(votes: Path, *args: str) -> Iterator[Batch]:
    trainer = Trainer(build(configure([*ARGS, *args])))
    trainer.prepare(votes.parent, lambda: False)
    yield from trainer.batches(trainer.source.collect(0), 0)
    trainer.close()


def test_a_pair_and_a_ranking_of_two_are_plus_and_minus_one(votes: Path) -> None:
    """As Diffusion-DPO has them, whatever the other groups of the iteration are; ties give nothing."""
    (votes / "preferences.jsonl").unlink()
    names = [paint(votes / f"{number}.png", number) for number in range(2)]
    vote(votes, {"prompt": "a", "win": names[0], "lose": names[1]})
    vote(votes, *({"prompt": "b", "image": names[number], "rank": 1 + number} for number in (0, 1)))
    vote(votes, *({"prompt": "c", "image": names[number], "rating": 3} for number in (0, 1)))
    (batch,) = batches_of(votes, "--advantage.std=off")
    assert len(batch.x0) == 6
    of = {tuple(pair.tolist()) for pair in batch.advantage.reshape(3, 2)}
    assert of == {(1.0, -1.0), (0.0, 0.0)}
    for objective, beta in (("dgpo", 1.0), ("diffusion_dpo", 1.0)):
        (batch,) = batches_of(votes, f"--objective={objective}", "--advantage.std=group")
        assert beta * batch.advantage.abs().max() == pytest.approx(1, abs=2e-4)


def test_groups_of_any_size_learn_the_mean_over_groups(votes: Path) -> None:
    """The gradient and the loss of an iteration are the means of those of its groups, each learned alone."""
    trainer = Trainer(build(configure([*ARGS, "--rollout.groups=6", "--dgpo.beta=1000"])))
    trainer.prepare(votes.parent, lambda: False)
    learner, weights = trainer.learner, trainer.models.weights
    generator = torch.manual_seed(0)
    trainer.models.load_weights({n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in weights.items()})

    def gradient(batches: list[Batch]) -> tuple[torch.Tensor, float]:
        for weight in weights.values():
            weight.grad = None
        loss = float(learner._accumulate(batches)["loss"])
        return torch.cat([weight.grad.flatten() for weight in weights.values() if weight.grad is not None]), loss

    batches = trainer.batches(trainer.source.collect(0), 0)
    assert len({batch.group_size for batch in batches}) > 1
    groups = [
        batch.taken(rows, batch.part.only(rows.start, rows.stop))
        for batch in batches
        for rows in (slice(g * batch.group_size, (g + 1) * batch.group_size) for g in range(batch.groups))
        if batch.part is not None
    ]
    assert len(groups) == 6
    numbers = torch.cat([batch.group_index.unique() for batch in batches])
    assert len(numbers.unique()) == 6, "each group has noise of its own"
    alone = [gradient([group]) for group in groups]
    found, loss = gradient(batches)
    expected = torch.stack([each for each, _ in alone]).mean(0)
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)
    assert loss == pytest.approx(np.mean([each for _, each in alone]), rel=1e-4)
    trainer.close()


def test_global_deviations_are_those_of_all_sizes(votes: Path) -> None:
    found = list(batches_of(votes, "--advantage.std=global", "--rollout.groups=6", "--advantage.clamp=none"))
    off = list(batches_of(votes, "--advantage.std=off", "--rollout.groups=6", "--advantage.clamp=none"))
    ratios = torch.cat([(b.advantage / a.advantage).nan_to_num(0) for a, b in zip(found, off, strict=True)])
    assert len({round(ratio, 4) for ratio in ratios.tolist() if ratio}) == 1
    assert Advantage().std == "group"


def test_metrics_of_all_sizes_are_means_over_images() -> None:
    """Counts are added; what is unknown of one size is of the others."""
    parts = [
        {"images_count": 2, "reward_mean": 1.0, "groups_equal_count": 1, "only": None},
        {"images_count": 6, "reward_mean": 2.0, "groups_equal_count": 0, "only": 3.0},
    ]
    assert joined(parts) == {"images_count": 8, "reward_mean": 1.75, "groups_equal_count": 1, "only": 3.0}
    assert joined(parts[:1]) == parts[0]


def test_noise_that_repeats_needs_no_forward_of_the_base(votes: Path) -> None:
    """The second pass has the first one's batches and noise, and the base's predictions of then."""
    trainer = Trainer(build(configure([*ARGS, "--data.noise-passes=1", "--rollout.groups=16", "--iterations=9"])))
    trainer.prepare(votes.parent, lambda: False)
    rows: list[int] = []
    trainer.models.base.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    assert trainer.source.period == 2  # type: ignore[attr-defined]
    first = trainer.source.collect(0)[0].x0
    trainer.console.start_training(0, 9)
    for _ in range(2):
        trainer.step()
    assert sum(rows) > 0
    done = len(rows)
    for _ in range(4):
        trainer.step()
    assert len(rows) == done
    assert torch.equal(trainer.source.collect(4)[0].x0, first)
    trainer.close()


def test_encoded_pictures_are_those_of_diffusers(votes: Path, random_pipeline: Path) -> None:
    """The image processor and the autoencoder of diffusers, with its scale and shift."""
    trainer = Trainer(build(configure(ARGS)))
    trainer.prepare(votes.parent, lambda: False)
    pipeline = load_pipeline(str(random_pipeline), revision=None, device=torch.device("cpu"), dtype=torch.float32)
    image = votes / "7.png"
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(Image.open(image))
        mode = pipeline.vae.encode(pixels).latent_dist.mode()[0]
    expected = (mode - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    found = trainer.source.latents([image])[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    picture = torch.from_numpy(np.array(Image.open(image)))
    half = encode_picture(pipeline.vae, picture)
    torch.testing.assert_close(half, expected, rtol=1e-5, atol=1e-5)
    assert len(load_file(next((votes.parent / "latents").iterdir()))["x0"]) == len(expected)
    trainer.close()


def test_what_cannot_be_learned_from_is_named(votes: Path) -> None:
    """One line, with file and line number, before the run has a folder."""
    file = votes / "preferences.jsonl"
    good = file.read_text()

    def told(*lines: dict, args: tuple[str, ...] = (), alone: bool = False) -> str:
        file.write_text("" if alone else good)
        vote(votes, *lines)
        return message(train, [*ARGS, *args])

    last = f"votes/preferences.jsonl:{len(good.splitlines()) + 1}: "
    assert told({"prompt": "x", "image": "0.png", "like": True}) == (
        f"{last}the only like of its prompt, and dgpo compares pictures of one prompt: judge another picture of it, or "
        "remove the line, or use --objective kto"
    )
    assert "the only rating of its prompt" in told({"prompt": "x", "image": "0.png", "rating": 1})
    assert told({"prompt": "x", "image": "zero.png", "rating": 1}).startswith(f"{last}no such picture: votes/zero.png")
    paint(votes / "wide.png", 0, 16, 32)
    assert f"{last}votes/wide.png has 16 high, 32 wide and the run 16 × 16 pixels" in told(
        {"prompt": "x", "win": "0.png", "lose": "wide.png"}
    )
    assert "a rating, and kto learns from likes and pairs" in told(args=("--objective=kto",))
    liked = {"prompt": "x", "image": "0.png", "like": True}
    assert told(liked, alone=True, args=("--objective=kto",)) == (
        "votes: no picture is disliked, and kto needs both sides: judge some more"
    )
    equal = [{"prompt": "x", "image": f"{number}.png", "rating": 3} for number in (0, 1)]
    assert "all pictures of a prompt are judged alike" in told(*equal, alone=True)
    assert "data.preferences is none" in message(train, ["small.yaml", "--data.source=preferences"])
    assert "data.source is online" in message(train, ["small.yaml", "--data.preferences=votes"])
    assert "objective kto learns from likes" in message(train, ["small.yaml", "--objective=kto"])
    for setting, expected in (("--advantage.keep=2", "any size"), ("--advantage.of=each", "no rewards")):
        assert expected in message(train, [*ARGS, setting])
    assert "learns from the steps of its own rollouts" in message(
        train, [*ARGS, "--objective=flow_grpo", "--rollout.solver=euler", "--rollout.noise-level=0.7"]
    )
    assert not Path("runs").exists()


def test_a_changed_judgement_or_picture_is_no_resumed_run(votes: Path) -> None:
    assert train([*ARGS, "--iterations=1"]) == 0
    more = ["--resume", "runs/run", "--iterations", "2"]
    file = votes / "preferences.jsonl"
    good = file.read_text()
    file.write_text(good.replace('"rating": 5', '"rating": 6'))
    assert "the preferences changed since the run began" in message(train, more)
    file.write_text(good)
    assert train(more) == 0
