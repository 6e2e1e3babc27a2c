"""Negative prompts: where they come from, and that everything which is guided leads away from them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_fast.config.command_line import configure
from dgpo_fast.config.options import Config, Rollout
from dgpo_fast.engine.recorded import RecordedRollouts
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.evaluation.results import BEFORE_FILE
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.prompt_cache import PromptCache
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.prompts import Prompt, load_run_prompts, with_negative
from dgpo_fast.prompts.files import read_prompts
from dgpo_fast.prompts.prompt import digest
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import Sampler, initial_noise, plain_decoding
from dgpo_fast.rollout.schedule import make_schedule, make_scheduler
from dgpo_fast.train import train
from tests.engine.tape import TapeRecorder
from tests.evaluation.cases import SMALL
from tests.runs import untimed
from tests.texts import message, write

PROMPTS = ["a cat", "two birds", "a house", "big red car", "a cat"]
NEGATIVE = ["", "a dog", "blurry", "a dog", "low"]
OFFLINE = ["--data.source=offline", "--data.offline-groups=4", "--data.folder=groups", "--iterations=1"]


def loaded(folder: Path) -> object:
    return load_pipeline(str(folder), revision=None, device=torch.device("cpu"), dtype=torch.float32)


def make_sampler(pipeline: object) -> Sampler:
    decode = plain_decoding(pipeline.vae, 5)  # type: ignore[attr-defined]
    transformer = pipeline.transformer  # type: ignore[attr-defined]
    return Sampler(pipeline, transformer, PromptEncoder(pipeline, 9), resolution=None, decode=decode)


def drawn(sampler: Sampler, draw: Draw, negative: list[str] | None) -> torch.Tensor:
    return torch.cat(list(sampler.batches(PROMPTS, draw, first=0, seed=0, negative=negative)))


@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler"])
def test_negative_prompts_draw_what_diffusers_draws(solver: str, random_pipeline: Path) -> None:
    """A batch of several negative prompts, one of them empty: latents to 1e-5, relative to their size."""
    pipeline = loaded(random_pipeline)
    sampler, draw = make_sampler(pipeline), Draw(make_schedule(solver, 6, 3.0), Guidance(4.5), batch_size=5)
    ours = drawn(sampler, draw, NEGATIVE)
    pipeline.scheduler = make_scheduler(solver, 3.0)  # type: ignore[attr-defined]
    theirs = pipeline(  # type: ignore[operator]
        PROMPTS,
        negative_prompt=NEGATIVE,
        latents=initial_noise(sampler.shape, torch.arange(5), seed=0, draw=0),
        num_inference_steps=6,
        guidance_scale=4.5,
        max_sequence_length=9,
        height=16,
        width=16,
        output_type="latent",
    ).images
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    plain = drawn(sampler, draw, None)
    moved = (ours - plain).abs().amax((1, 2, 3))
    assert moved[0] == 0 and (moved[1:] > 1e-2).all(), "the first one's negative prompt is the empty one"


def test_recorded_rollouts_take_the_negative_prompts_of_each_batch(random_pipeline: Path) -> None:
    """Under one recording, in a whole batch and in a partial one; without guidance, they are not read."""
    sampler, recorder = make_sampler(loaded(random_pipeline)), TapeRecorder()
    plain, recorded = sampler.solve, RecordedRollouts(recorder)
    for guidance_scale in (3.0, 1.0):
        draw, found = Draw(make_schedule("dpmpp_2m", 4, 3.0), Guidance(guidance_scale), 3), []
        for negative in (NEGATIVE, NEGATIVE[::-1], None):
            sampler.solve = recorded
            found.append(drawn(sampler, draw, negative))
            sampler.solve = plain
            assert torch.allclose(found[-1], drawn(sampler, draw, negative), atol=1e-5)
        assert torch.allclose(found[0], found[1]) is torch.allclose(found[1], found[2]) is (guidance_scale == 1.0)
    assert len(recorder.tapes) == 2, "one for each guidance scale"


def test_a_picture_that_is_not_finite_is_drawn_again_with_its_negative_prompt(random_pipeline: Path) -> None:
    """One whose negative prompt alone makes it so has its layer named."""
    sampler, draw = make_sampler(loaded(random_pipeline)), Draw(make_schedule("dpmpp_2m", 4, 3.0), Guidance(3.0), 1)
    rows = PromptEncoder(loaded(random_pipeline), 9)(["blurry"]).gathered()
    sampler.encoder.memory["blurry"] = {"prompt": rows["prompt"][0] * float("nan"), "pooled": rows["pooled"][0]}
    for negative, expected in (("", ""), ("low", ""), ("blurry", ", first in the transformer's context_embedder")):
        assert sampler.first_fault(Prompt("a cat", negative=negative), draw, number=0, seed=0) == expected


def test_each_text_is_held_once(random_pipeline: Path) -> None:
    text = PromptEncoder(loaded(random_pipeline), 9)(["a cat", "a dog", "a cat"], ["", "a cat", ""])
    assert text.rows["prompt"].shape[0] == 3 and text.index.tolist() == [0, 1, 0] and text.negative_index is not None
    assert text.negative_index.tolist() == [2, 0, 2]
    assert text[1:].repeat_interleave(2).negative_index.tolist() == [0, 0, 2, 2]  # type: ignore[union-attr]
    prompt, pooled = text[1:].gathered_pairs().values()
    assert torch.equal(prompt, text.rows["prompt"][[1, 0, 0, 2]]) and torch.equal(
        pooled, text.rows["pooled"][[1, 0, 0, 2]]
    )


FILES = {
    "p.jsonl": '{"prompt": "a", "negative_prompt": " blurry "}\n{"prompt": "b"}\n'
    '{"prompt": "c", "negative_prompt": null}\n{"prompt": "d", "negative_prompt": ""}\n',
    "p.csv": 'Prompts,Negative_Prompt\na,"blurry"\nb,\nc, \n',
    "p.tsv": "negative prompt\tprompt\nblurry\ta\n\tb\n\tc\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_line_of_a_file_has_its_own_negative_prompt(name: str, tmp_path: Path) -> None:
    """Or gets the setting's; `""` in a .jsonl is a negative prompt of its own, the empty one."""
    prompts = read_prompts(write(tmp_path / name, FILES[name]))
    assert [prompt.negative for prompt in prompts] == ["blurry", "", "", ""][: len(prompts)]
    filled = [prompt.negative for prompt in with_negative(prompts, "low")]
    assert filled == ["blurry", "low", "low", ""][: len(prompts)]
    assert [p.negative for p in with_negative(with_negative(prompts, "low"), "")] == [p.negative for p in prompts]


@pytest.mark.parametrize("wrong", ["3", "true", '["blurry", "low"]', '{"text": "blurry"}'])
def test_a_negative_prompt_that_is_no_text(wrong: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", f'{{"prompt": "a"}}\n{{"prompt": "b", "negative_prompt": {wrong}}}\n')
    expected = f'{path}:2: "negative_prompt" is no string: write a text, as in "negative_prompt": "blurry"'
    assert message(read_prompts, path) == expected


def test_a_negative_prompt_that_no_tokenizer_takes(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "b", "negative_prompt": "a\\u0000b"}')
    assert message(read_prompts, path) == f'{path}:1: "negative_prompt" holds a NUL character: leave it out'


def test_two_columns_of_negative_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "prompt,negative prompt,negative_prompt\na,b,c\n")
    assert message(read_prompts, path) == f"{path}:1: two columns are called 'negative_prompt': rename one of them"


def test_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training and evaluation prompts, from generators too. None is the empty text, wherever it is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text("rollout: {negative_prompt: null}\n")
    assert configure(["s.yaml"]).rollout.negative_prompt == Config().rollout.negative_prompt == ""
    assert configure(["--rollout.negative-prompt", "none"]).rollout.negative_prompt == ""
    with pytest.raises(UserError, match=r"^command line: unknown setting 'negative_prompt': did you mean 'rollout\."):
        configure(["--negative-prompt", "blurry"])
    (tmp_path / "wrong.yaml").write_text("rollout: {negative_prompt: [blurry]}\n")
    with pytest.raises(UserError, match=r"^wrong\.yaml: rollout\.negative_prompt: input should be a valid string, not"):
        configure(["wrong.yaml"])
    sets = load_run_prompts(Config(rollout=Rollout(negative_prompt=" blurry ")))
    assert {prompt.negative for prompt in [*sets.train, *sets.held_out]} == {"blurry"}


def test_what_prompts_without_negative_ones_are_known_by_has_stayed() -> None:
    """Runs, evaluations and groups of earlier versions are found again; a negative prompt makes another list."""
    prompts = [Prompt("a cat", {"tag": "animals"}), Prompt("a dog")]
    lines = json.dumps([["a cat", {"tag": "animals"}], ["a dog", {}]], sort_keys=True)
    assert json.dumps([prompt.to_json() for prompt in prompts], sort_keys=True) == lines
    assert digest(prompts) == hashlib.sha256(lines.encode()).hexdigest()
    others = with_negative(prompts, "blurry")
    assert digest(others) not in (digest(prompts), digest(with_negative(prompts, "low")))
    assert [Prompt.from_json(prompt.to_json()) for prompt in [*prompts, *others]] == [*prompts, *others]


def test_negative_prompts_are_encoded_before_and_kept(tmp_path: Path, random_pipeline: Path) -> None:
    prompts = [Prompt("a cat", negative="low"), Prompt("a dog", negative="a cat"), Prompt("a hat", negative="blurry")]
    for known in (0, 5):
        pipeline = load_pipeline(
            str(random_pipeline), revision=None, device=torch.device("cpu"), dtype=torch.float32, with_text=False
        )
        encoder = PromptEncoder(pipeline, 9, PromptCache(tmp_path, {}, 2**30, note=pytest.fail))
        said = encoder.prepare(prompts)
        assert said.startswith(
            f"prompts, 2 negative ones with them: {known} of 5 were encoded before, {5 - known} now; the text encoders "
        ), "one that is a prompt too is counted once"
        assert encoder.encoders is None
        encoder([prompt.text for prompt in prompts], [prompt.negative for prompt in prompts])
        assert encoder.encoders is None, "nothing was left to encode"


def test_a_run_and_its_evaluations_lead_away_from_them(workspace: Path) -> None:
    """Lines of a file and the setting do the same; an evaluation of the run draws the run's own pictures."""
    lines = [
        json.dumps({"prompt": line, "negative_prompt": "a dog"})
        for line in Path("prompts.txt").read_text().split("\n")
        if line
    ]
    (workspace / "lines.jsonl").write_text("\n".join(lines))
    few = ["small.yaml", "--iterations", "2", "--dgpo.kl-guidance-scale", "2"]
    train([*few, "--name", "plain"])
    train([*few, "--name", "setting", "--rollout.negative-prompt", "a dog"])
    train([*few, "--name", "lines", "--prompts", "lines.jsonl"])
    plain, setting, by_lines = (untimed(workspace / "runs" / name) for name in ("plain", "setting", "lines"))
    assert setting == by_lines and setting != plain
    before = [np.load(workspace / "runs" / name / BEFORE_FILE)["images"] for name in ("plain", "setting")]
    assert (before[0] != before[1]).any()
    (workspace / "lines.jsonl").write_text("\n".join(lines).replace("a dog", "a tree"))
    with pytest.raises(UserError, match="the training prompts and the evaluation prompts changed since"):
        train(["--resume", "runs/lines", "--iterations", "3"])


def test_offline_groups_keep_their_negative_prompts(workspace: Path) -> None:
    """Another run finds them beside the prompts, and groups that lead away from something else are refused."""
    negative = ["--rollout.negative-prompt", "a dog"]
    run = ["small.yaml", *OFFLINE, "--dgpo.kl-guidance-scale", "2"]
    train([*run, "--name", "first", *negative])
    train([*run, "--name", "second", *negative])
    assert untimed(workspace / "runs/first") == untimed(workspace / "runs/second")
    for other in ([], ["--rollout.negative-prompt", "a tree"]):
        with pytest.raises(
            UserError, match=r"^groups: the training prompts and rollout\.negative_prompt changed since its groups"
        ):
            train([*run, "--name", "third", *other])


def test_offline_groups_of_earlier_versions_serve_on(workspace: Path) -> None:
    run = ["small.yaml", *OFFLINE]
    train([*run, "--name", "first"])
    manifest = json.loads(Path("groups/groups.json").read_text())
    assert manifest["conditions"].pop("rollout.negative_prompt") == ""
    Path("groups/groups.json").write_text(json.dumps(manifest))
    assert train([*run, "--name", "second"]) == 0


def test_evaluations_lead_away_from_them(workspace: Path) -> None:
    """Setting and lines draw the same pictures; a folder made with another one is not continued."""
    (workspace / "model").symlink_to(configure(["small.yaml"]).model)
    (workspace / "lines.jsonl").write_text('{"prompt": "a cat", "negative_prompt": "a dog"}\n{"prompt": "a hat"}\n')
    (workspace / "prompts.txt").write_text("a cat\na hat\n")
    made = {
        "plain": [],
        "setting": ["--negative-prompt", "a dog"],
        "lines": ["--prompts", "lines.jsonl"],
        "both": ["--prompts", "lines.jsonl", "--negative-prompt", "a tree"],
    }
    for name, arguments in made.items():
        assert evaluate(["model", *SMALL, *arguments, "--output", name]) == 0
    pictures = {name: [p.read_bytes() for p in sorted((workspace / name / "images").iterdir())] for name in made}
    assert pictures["lines"] == [pictures["setting"][0], pictures["plain"][1]]
    assert pictures["both"][0] == pictures["setting"][0]
    assert len({pictures[name][1] for name in made}) == 3, "the second line has no negative prompt of its own"
    with pytest.raises(UserError, match=r"^plain was made with negative_prompt , not a dog: choose another --output"):
        evaluate(["model", *SMALL, *made["setting"], "--output", "plain"])
    text = (workspace / "plain/evaluation.yaml").read_text()
    (workspace / "plain/evaluation.yaml").write_text(text.replace("negative_prompt: ''\n", ""))
    assert text != (workspace / "plain/evaluation.yaml").read_text(), "as earlier versions wrote it"
    assert evaluate(["model", *SMALL, "--output", "plain"]) == 0
