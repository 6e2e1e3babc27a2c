"""What of a user's prompts nothing reads, said in one line each: keys, columns, ends of long texts, further quotes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.command import evaluate
from dgpo_fast.models.families import make_family
from dgpo_fast.models.family import attach
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.prompt_notes import prompt_notes
from dgpo_fast.models.random_weights import find_architecture, random_pipeline
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.files import read_prompts
from dgpo_fast.prompts.prompt import quoted_text
from dgpo_fast.prompts.unread import Reader, unread_ends, unread_keys, unread_quotes
from dgpo_fast.rewards import load_rewards
from tests.evaluation.cases import SMALL
from tests.families import flux1, z_image
from tests.families.case import Case
from tests.texts import write

CPU = torch.device("cpu")


def keys_said(tmp_path: Path, name: str, content: str, rewards: list[str]) -> list[str]:
    prompts = read_prompts(write(tmp_path / name, content))
    return [line.removeprefix(f"{tmp_path}/") for line in load_rewards(rewards).check_prompts(prompts)]


DOG = '{"prompt": "a red circle", "include": [{"class": "circle", "count": 1, "%s": "red"}], "exclude": []}\n'
UNREAD = [
    (
        "prompts.jsonl",
        '{"prompt": "a", "image": "a.png", "seed": 3}\n{"prompt": "b", "seed": 4, "width": 512}\n',
        ["jpeg"],
        ["prompts.jsonl: these keys are not read: image, seed, width"],
    ),
    ("case.jsonl", '{"prompt": "a", "Tag": "t", "tag": "t"}', ["jpeg"], ["case.jsonl: these keys are not read: Tag"]),
    ("geneval.jsonl", DOG % "color", ["shapes"], []),
    ("geneval.jsonl", DOG % "color", ["jpeg"], ["geneval.jsonl: these keys are not read: exclude"]),
    ("geneval.jsonl", DOG % "colour", ["shapes"], ["geneval.jsonl: these keys are not read: include.colour"]),
    (
        "parti.tsv",
        "Prompt\tCategory\tChallenge\tNote\nGo\tText\tBasic\t\n",
        ["jpeg"],
        ["parti.tsv: these columns are not read: Challenge, Note"],
    ),
    ("index.csv", ",Prompts,negative_prompt\n0,a cat,\n", ["jpeg"], []),
    ("own.jsonl", '{"prompt": "a", "seed": 3}', ["jpeg", f"{__name__}:Anything"], []),
    (
        "own.jsonl",
        '{"prompt": "a", "seed": 3, "mood": 1}',
        [f"{__name__}:Mood"],
        ["own.jsonl: these keys are not read: seed"],
    ),
]


class Anything:
    """A reward that does not say which keys it reads."""

    def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
        return np.zeros(len(images))


class Mood(Anything):
    metadata_keys = ("mood",)


@pytest.mark.parametrize(("name", "content", "rewards", "expected"), UNREAD)
def test_keys_that_nothing_reads_are_named(
    name: str, content: str, rewards: list[str], expected: list[str], tmp_path: Path
) -> None:
    """Once for all lines of a file. A reward that may read anything reads all; generated prompts are our own."""
    assert keys_said(tmp_path, name, content, rewards) == expected


def test_keys_of_two_files_and_of_none() -> None:
    prompts = [Prompt("a", {"x": 1}, "p.jsonl:1"), Prompt("b", {"y\n": 1}, "e.csv:2"), Prompt("c", {"z": 1})]
    assert unread_keys(prompts, ()) == ["p.jsonl: these keys are not read: x", "e.csv: these columns are not read: y"]
    many = Prompt("a", {f"k{n}": n for n in range(40)}, "p.jsonl:1")
    assert unread_keys([many], ()) == [
        f"p.jsonl: these keys are not read: {', '.join(f'k{n}' for n in range(12))} and 28 more"
    ]


def test_several_quoted_texts() -> None:
    """The first is taken, and said to be; the one after says is meant, and one text quoted twice is one."""
    several = ['a "RED" door and a "BLUE" one', "a “RED” door and a “BLUE” one"]
    fine = [
        'a sign that says "OPEN"',
        'a "RED" door beside a sign that says "OPEN"',
        'a 12" ruler beside a sign that says "OPEN"',
        'a 5\'10" man with a shirt that says "HI"',
        'two signs, "GO" and "GO"',
    ]
    assert [quoted_text(text) for text in [*several, *fine]] == ["RED", "RED", "OPEN", "OPEN", "OPEN", "HI", "GO"]
    prompts = [Prompt(text, origin=f"p.txt:{n}") for n, text in enumerate([*fine, *several], 1)]
    assert unread_quotes(prompts) == (
        "in 2 of 7 prompts the first quoted text is taken, although others are quoted (the first: p.txt:6): "
        "write says before the words to be drawn"
    )
    assert unread_quotes(prompts[: len(fine)]) is None


def letters(limit: int, name: str = "CLIP") -> Reader:
    """Reads a letter as a token, between a beginning and an end."""
    return Reader(name, limit, lambda texts: [[-1, *map(ord, text), -2] for text in texts])


def test_ends_of_long_texts_are_counted_for_each_encoder() -> None:
    texts = ["abc", "bbcd", "cbcdef", "dbcdefgh", "ebcdefghi", "abc"]
    assert unread_ends(texts, [letters(11)]) is None
    assert (
        unread_ends(texts, [letters(10)]) == "1 of 5 prompts is longer than 10 tokens (CLIP): what follows is not read"
    )
    both = unread_ends(texts, [letters(6), letters(10, "T5")])
    assert both == "3 of 5 prompts are longer than 6 tokens (CLIP), 1 longer than 10 (T5): what follows is not read"
    assert unread_ends(texts, [letters(20), letters(10, "T5")]) == (
        "1 of 5 prompts is longer than 10 tokens (T5): what follows is not read"
    )


def test_texts_that_become_one_are_counted() -> None:
    """`abcd` fits as it is, and the three that begin with it are cut to it; for T5, only two of them are one."""
    texts = ["abcd", "abcde", "abcdefgx", "abcdefgy", "zbcde"]
    assert unread_ends(texts, [letters(6)], "negative prompt") == (
        "4 of 5 negative prompts are longer than 6 tokens (CLIP): what follows is not read; 3 of them are then the "
        "same as another one"
    )
    assert str(unread_ends(texts, [letters(6), letters(9, "T5")])).endswith(
        "; 1 of them is then the same as another one"
    )


def test_short_texts_are_not_tokenised() -> None:
    def fail(texts: list[str]) -> list[list[int]]:
        raise AssertionError(texts)

    assert unread_ends(["a" * 74] * 9, [Reader("CLIP", 77, fail)]) is None
    with pytest.raises(AssertionError, match="é"):
        unread_ends(["é"], [Reader("CLIP", 77, fail)])


def count(tokenizer: object, limit: int, texts: list[str]) -> int:
    """How many of `texts` a tokenizer cuts, by cutting them."""
    cut = [len(tokenizer(text, truncation=True, max_length=limit)["input_ids"]) for text in texts]  # type: ignore[operator]
    whole = [len(tokenizer(text)["input_ids"]) for text in texts]  # type: ignore[operator]
    return sum(some < all_of_it for some, all_of_it in zip(cut, whole, strict=True))


def test_the_encoders_of_a_pipeline(random_pipeline: Path) -> None:
    """With and without its encoders loaded; the counts are what each tokenizer cuts, the negative prompts' too."""
    texts = ["a cat", "a bird in a tree", "abcdefghijkl", "abcdef", "abcdefg h"]
    prompts = [Prompt(text, negative="low quality picture") for text in texts]
    whole = load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32)
    clip, t5 = count(whole.tokenizer, 12, texts), count(whole.tokenizer_3, 9, texts)
    assert 0 < clip < t5 < len(texts)
    for with_text in (True, False):
        pipeline = load_pipeline(
            str(random_pipeline), revision=None, device=CPU, dtype=torch.float32, with_text=with_text
        )
        assert prompt_notes(pipeline, 9, prompts, guided=True) == [
            f"{clip} of 5 prompts are longer than 12 tokens (CLIP), {t5} longer than 9 (T5): what follows is not read",
            "1 of 1 negative prompt is longer than 12 tokens (CLIP), 1 longer than 9 (T5): what follows is not read",
        ]
    assert prompt_notes(pipeline, 9, prompts[:1], guided=False) == [
        "negative prompts are not read: guidance is off (guidance_scale)"
    ]
    without = random_pipeline_without_encoders()
    assert prompt_notes(without, 9, prompts, guided=True) == []


@pytest.mark.parametrize(
    ("case", "why"), [(flux1.CASE, "FLUX.1 is not guided by them"), (z_image.CASE, "guidance is off (guidance_scale)")]
)
def test_a_family_says_why_negative_prompts_are_not_read(case: Case, why: str, tmp_path: Path) -> None:
    """FLUX.1-dev is guided whatever its guidance_scale is; Z-Image is not at 0."""
    pipeline = case.make()
    attach(pipeline.transformer, case.family_of(pipeline, tmp_path))
    prompts = [Prompt("a cat", negative="blurry")]
    assert prompt_notes(pipeline, 512, prompts, guided=False) == [f"negative prompts are not read: {why}"]


def random_pipeline_without_encoders() -> object:
    return random_pipeline(make_family(find_architecture("tiny")), device=CPU, dtype=torch.float32, seed=0)


def test_without_t5_clip_alone_is_named() -> None:
    pipeline = load_pipeline("tiny", revision=None, device=CPU, dtype=torch.float32, with_text=False)
    prompts = [Prompt("a photo of a red circle " * 9), Prompt("a photo of three rings")]
    (line,) = prompt_notes(pipeline, 0, prompts, guided=True)
    assert line == "1 of 2 prompts is longer than 12 tokens (CLIP): what follows is not read"


def test_a_tokenizer_that_cannot_be_loaded_is_one_line(tmp_path: Path, random_pipeline: Path) -> None:
    model = shutil.copytree(random_pipeline, tmp_path / "model")
    for file in (model / "tokenizer_3").iterdir():
        file.unlink()
    pipeline = load_pipeline(str(model), revision=None, device=CPU, dtype=torch.float32, with_text=False)
    with pytest.raises(UserError, match=r"^the tokenizer in .*/model/tokenizer_3 cannot be loaded: "):
        prompt_notes(pipeline, 9, [Prompt("a long prompt of many words")], guided=True)


def test_rewards_that_read_less_than_the_model_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's rewards read 77 tokens, ImageReward 35."""
    from dgpo_fast.rewards.shipped.clip import CosineReward
    from dgpo_fast.rewards.shipped.imagereward import MAX_TOKENS, ImageRewardReward

    cosine, blip = CosineReward.__new__(CosineReward), ImageRewardReward.__new__(ImageRewardReward)
    cosine._clip = type("Clip", (), {"reader": letters(77)})()
    blip._tokenizer = lambda texts, **_: {"input_ids": letters(MAX_TOKENS).tokenize(texts)}
    prompts = [Prompt(letter * length) for letter, length in zip("abcd", (33, 34, 75, 76), strict=True)]
    end = ": what follows is not read"
    assert cosine.check_prompts(prompts) == f"1 of 4 prompts is longer than 77 tokens (CLIP){end}"
    assert blip.check_prompts(prompts) == f"3 of 4 prompts are longer than 35 tokens (BERT){end}"


def test_a_run_and_an_evaluation_say_it(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in one line, of training and evaluation prompts together; with the prompt cache, as all runs here."""
    lines = [{"prompt": f"{word} cat", "seed": 3} for word in ("a", "big", "red", "old", "low", "extraordinary")]
    (workspace / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (workspace / "held_out.jsonl").write_text('{"prompt": "a dog", "width": 512}\n')
    off = ["--rollout.guidance-scale", "1", "--evaluation.guidance-scale", "1", "--rollout.negative-prompt", "blurry"]
    args = ["small.yaml", "--prompts", "prompts.jsonl", "--eval-prompts", "held_out.jsonl"]
    said = []
    for more in ([], off):
        build(configure([*args, *more])).reward_pool.close()
        said.append([line for line in capsys.readouterr().out.splitlines() if "not read" in line])
    keys = ["prompts.jsonl: these keys are not read: seed", "held_out.jsonl: these keys are not read: width"]
    long = "1 of 7 prompts is longer than 12 tokens (CLIP), 1 longer than 9 (T5): what follows is not read"
    assert said == [[*keys, long], [*keys, long, "negative prompts are not read: guidance is off (guidance_scale)"]]
    drawing = ["--prompts", "prompts.jsonl", "--negative-prompt", "blurry", "--guidance-scale", "1"]
    model = str(configure(["small.yaml"]).model)
    assert evaluate([model, *SMALL, *drawing, "--output", "out"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not read" in line]
    assert said == [keys[0], long.replace("7", "6"), "negative prompts are not read: guidance is off (guidance_scale)"]
