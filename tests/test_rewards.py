"""Rewards: weighting, failures that cost their group alone, the registry's messages, JPEG, and the real OCR engine."""

import io
import json
import re
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import WeightedReward, load_rewards
from dgpo_fast.rewards.registry import BUILT_IN, parse_spec
from dgpo_fast.rewards.remote.judge import JudgeReward
from dgpo_fast.rewards.shipped.jpeg import JpegReward
from dgpo_fast.user_code import import_attribute
from tests.reward_cases import PROMPTS, pictures
from tests.texts import message


def mean(images, prompts, metadata):
    return images.mean((1, 2, 3))


def weighted(**rewards) -> WeightedReward:
    return WeightedReward(rewards, dict.fromkeys(rewards, 1.0))


def test_groups_are_cut_only_for_rewards_that_score_each_picture_on_its_own():
    def alone(images, prompts, metadata):
        return mean(images, prompts, metadata)

    alone.independent_images = True
    weighted(alone=alone).check_processes(processes=4, groups=3)
    both = weighted(alone=alone, ranks=mean)
    both.check_processes(processes=4, groups=4)
    assert both.dependent_images == "ranks"
    line = message(both.check_processes, 4, 3)
    assert line.startswith("reward 'ranks' may compare the pictures of a group, and 4 processes would cut 3 groups")
    assert "--rollout.groups 4 or more" in line and "independent_images = True" in line


def test_shipped_rewards_and_judges_score_each_picture_on_its_own():
    """They say so. `test_scores_do_not_depend_on_the_batch` scores pictures alone and together with each of them, and
    `test_a_judge_scores_each_picture_on_its_own` with a judge."""
    made = [import_attribute(name, source, example="") for name, source in BUILT_IN.items() if "compat" not in name]
    assert all(one.independent_images is True for one in [*made, JudgeReward])


def test_what_is_behind_a_name(tmp_path, monkeypatch):
    """Shipped rewards are known by their names, own ones by their module's file, or by what they say themselves."""
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "behind_a_name.py"
    module.write_text("def zero(images, prompts, metadata):\n    return [0] * len(images)\n")
    specs = ["jpeg", "own=behind_a_name:zero=2"]
    first = load_rewards(specs).contents
    assert list(first) == ["content of behind_a_name:zero"]
    module.write_text(module.read_text() + "\n")
    assert load_rewards(specs).contents.keys() == first.keys() and load_rewards(specs).contents != first
    sys.modules["behind_a_name"].zero.fingerprint = "all zeros"
    assert load_rewards(specs).contents == {"content of behind_a_name:zero": "all zeros"}
    sys.modules.pop("behind_a_name")


def test_weighted_sum_and_parts_by_hand():
    def with_parts(images, prompts, metadata):
        scores = [10.0 * len(prompt) for prompt in prompts]
        return scores, {"tagged": ["tag" in m for m in metadata]}

    both = WeightedReward({"mean": mean, "length": with_parts}, {"mean": 0.5, "length": -1.0})
    scores = both.score_groups(pictures(), PROMPTS, 2)
    assert scores.rewards.dtype == np.float32 and scores.valid.all() and scores.failures == []
    np.testing.assert_array_equal(scores.rewards, [[-40, -39.5], [-29, -28.5], [-28, -27.5]])
    np.testing.assert_array_equal(scores.parts["mean"], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(scores.parts["length"], [[40, 40], [30, 30], [30, 30]])
    np.testing.assert_array_equal(scores.parts["length/tagged"], [[0, 0], [1, 1], [0, 0]])
    assert set(scores.parts) == {"mean", "length", "length/tagged"}


def test_every_reward_is_called_once_per_group_with_its_own_copies():
    calls = []

    def vandal(images, prompts, metadata):
        calls.append((images.shape, list(prompts), [dict(m) for m in metadata]))
        images[:] = 255
        metadata[0]["tag"] = "spoilt"
        return np.zeros(len(images))

    images = pictures()
    scores = weighted(vandal=vandal, mean=mean).score_groups(images, PROMPTS, 2)
    assert calls == [((2, 8, 8, 3), [p.text] * 2, [p.metadata] * 2) for p in PROMPTS]
    np.testing.assert_array_equal(scores.rewards.ravel(), np.arange(6))
    assert (images == pictures()).all() and PROMPTS[1].metadata == {"tag": "t"}


FINITE = "return a finite number, or raise where there is none"
FAILURES = {
    "exits": (lambda n: sys.exit("no weights"), "SystemExit: no weights (HERE)"),
    "raises": (lambda n: 1 / 0, "ZeroDivisionError: division by zero (HERE)"),
    "raises elsewhere": (
        lambda n: json.loads("{"),
        "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1) (HERE)",
    ),
    "two lines": (lambda n: int("a\nb"), "ValueError: invalid literal for int() with base 10: 'a\\nb' (HERE)"),
    "nan": (lambda n: [0.5] * (n - 1) + [np.nan], f"returned NaN for picture 2 of 2: {FINITE}"),
    "infinity": (
        lambda n: [np.inf] * n,
        f"returned infinity, or a number beyond float32, for picture 1 of 2: {FINITE}",
    ),
    "beyond float32": (
        lambda n: [1e300] * n,
        f"returned infinity, or a number beyond float32, for picture 1 of 2: {FINITE}",
    ),
    "too few": (lambda n: np.zeros(n - 1), "returned 1 score for 2 pictures"),
    "column": (lambda n: np.zeros((n, 1)), "returned an array of shape (2, 1) instead of 2 scores"),
    "one number": (lambda n: 0.5, "returned one number instead of 2 scores"),
    "part": (lambda n: (np.zeros(n), {"a": np.zeros(3)}), "part 'a' is 3 scores for 2 pictures"),
    "no dictionary": (lambda n: (np.zeros(n), None), "must return scores, or (scores, dictionary of parts)"),
    "three things": (lambda n: (np.zeros(n), {}, {}), "must return scores, or (scores, dictionary of parts)"),
    "nothing": (lambda n: None, "returned None instead of 2 scores"),
    "text": (lambda n: ["0.5"] * n, "returned text instead of 2 scores: make numbers of it"),
    "an array of text": (
        lambda n: np.array([0.5, "0.5"], object),
        "returned text instead of 2 scores: make numbers of it",
    ),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_costs_its_group_alone(kind):
    outcome, reason = FAILURES[kind]

    def sometimes(images, prompts, metadata):
        return outcome(len(images)) if prompts[0] == "one" else np.ones(len(images))

    scores = weighted(sometimes=sometimes, mean=mean).score_groups(pictures(), PROMPTS, 2)
    assert scores.valid.tolist() == [True, False, True]
    np.testing.assert_array_equal(scores.rewards, np.float32([[1, 2], [np.nan, np.nan], [5, 6]]))
    np.testing.assert_array_equal(scores.parts["mean"], [[0, 1], [2, 3], [4, 5]])
    assert np.isnan(scores.parts["sometimes"][1]).all()
    assert len(scores.failures) == 1
    told = re.sub(r"\([^()]*test_rewards\.py, line \d+\)$", "(HERE)", scores.failures[0])
    assert told == f"reward 'sometimes', prompt 'one' (p.txt:2): {reason}"


def test_a_failure_counts_whatever_its_weight_and_all_are_reported():
    def broken(images, prompts, metadata):
        raise RuntimeError("first line\nsecond line " + "x" * 500)

    reward = WeightedReward({"a": broken, "b": broken, "mean": mean}, {"a": 0.0, "b": 1.0, "mean": 1.0})
    scores = reward.score_groups(pictures(4), PROMPTS[1:], 2)
    assert not scores.valid.any() and np.isnan(scores.rewards).all() and len(scores.failures) == 4
    assert scores.failures[0].startswith("reward 'a', prompt 'one' (p.txt:2): RuntimeError: first line second line xxx")
    assert scores.failures[3].startswith("reward 'b', prompt 'two': ")
    assert all("\n" not in line and len(line) < 300 for line in scores.failures)


MIXED = [
    Prompt("zero", {"reward": "length"}, "p.jsonl:1"),
    Prompt("one", {"reward": ["mean"]}, "p.jsonl:2"),
    Prompt("two"),
]


def length(images, prompts, metadata):
    return [10.0 * len(prompt) for prompt in prompts]


def test_metadata_chooses_a_prompts_rewards():
    """Only they are asked, counted and summed; the other rewards say nothing of the prompt."""
    reward = WeightedReward({"mean": mean, "length": length}, {"mean": 2.0, "length": 1.0})
    scores = reward.score_groups(pictures(), MIXED, 2)
    assert scores.valid.all() and not scores.failures
    np.testing.assert_array_equal(scores.rewards, [[40, 40], [4, 6], [38, 40]])
    np.testing.assert_array_equal(scores.parts["mean"], [[np.nan, np.nan], [2, 3], [4, 5]])
    np.testing.assert_array_equal(scores.parts["length"], [[40, 40], [np.nan, np.nan], [30, 30]])


def test_a_reward_checks_only_the_prompts_chosen_for_it():
    checked = {}

    class Picky:
        def __init__(self, name):
            self.name = name

        def __call__(self, images, prompts, metadata):
            return np.zeros(len(images))

        def check_prompts(self, prompts):
            checked[self.name] = [prompt.text for prompt in prompts]

    weighted(mean=Picky("mean"), length=Picky("length")).check_prompts(MIXED)
    assert checked == {"mean": ["one", "two"], "length": ["zero", "two"]}


TRIED = "tried out on {} for prompt 'zero' (p.txt:1): {}: fix it, or set needs_real_pictures = True in it if it "
TRIED += "cannot score such pictures (docs/rewards.md)"


@pytest.mark.parametrize(
    ("own", "count", "reason"),
    [
        (lambda i, p, m: [i[0].mean() / 255], 6, "returned 1 score for 6 pictures"),
        (lambda i, p, m: [np.nan if len(i) == 1 else 0.5] * len(i), 1, f"returned NaN for picture 1 of 1: {FINITE}"),
        (lambda i, p, m: None, 6, "returned None instead of 6 scores"),
        (lambda i, p, m: [one["tag"] for one in m], 6, "KeyError: 'tag' (HERE)"),
    ],
    ids=["of one picture", "of several pictures", "nothing", "of what the prompts lack"],
)
def test_own_rewards_are_tried_out_as_they_will_be_asked(own, count, reason):
    line = message(weighted(mean=mean, own=own).try_out, PROMPTS, {6: (32, 32), 1: (32, 32)})
    squares = "1 coloured square" if count == 1 else f"{count} coloured squares"
    assert (
        re.sub(r"\([^()]*test_rewards\.py, line \d+\)", "(HERE)", line)
        == f"reward 'own', {TRIED.format(squares, reason)}"
    )


def test_what_rewards_are_tried_out_on():
    """Each of the user's own on squares of the run's size, for the first prompt that is its to score; no other."""
    seen = []

    class Ranks:
        def __call__(self, images, prompts, metadata):
            seen.append((images.shape, prompts[0], images[:, 16, 16].argmax(-1).tolist(), images[0, 0, 0].tolist()))
            return images.mean((1, 2, 3)).argsort().argsort()

    class Faces(Ranks):
        needs_real_pictures = True

        def __call__(self, images, prompts, metadata):
            raise ValueError("no face")

    rewards = weighted(length=Ranks(), faces=Faces(), mean=mean, jpeg=JpegReward(), never=Faces())
    rewards.try_out([MIXED[1], MIXED[0]], {5: (32, 32), 1: (32, 32)})
    assert seen == [((5, 32, 32, 3), "zero", [0, 1, 2, 0, 0], [225] * 3), ((1, 32, 32, 3), "zero", [0], [225] * 3)]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("ocr", "p.jsonl:7: no reward 'ocr' in this run: use mean, length, or add it to --rewards"),
        (["mean", "ocr"], "p.jsonl:7: no reward 'ocr' in this run: use mean, length, or add it to --rewards"),
        (3, 'p.jsonl:7: "reward" is no name and no list of names: use mean, length'),
        ([], 'p.jsonl:7: "reward" is no name and no list of names: use mean, length'),
        ({"mean": 1}, 'p.jsonl:7: "reward" is no name and no list of names: use mean, length'),
        ("length", "p.jsonl:7: its rewards (length) all have the weight 0: give one a weight"),
    ],
)
def test_a_choice_that_cannot_be(chosen, expected):
    reward = WeightedReward({"mean": mean, "length": length}, {"mean": 1.0, "length": 0.0})
    prompts = [*PROMPTS, Prompt("three", {"reward": chosen}, "p.jsonl:7")]
    assert message(reward.check_prompts, prompts) == expected


def test_rewards_elsewhere_are_asked_for_several_groups_at_a_time():
    """All three groups wait for one another, which they can only do together; the reward at home has one thread."""
    together, threads = threading.Barrier(3, timeout=20), set()

    class Elsewhere:
        groups_at_once = 3

        def __call__(self, images, prompts, metadata):
            together.wait()
            if prompts[0] == "one":
                raise RuntimeError("lost")
            return images.mean((1, 2, 3))

    def at_home(images, prompts, metadata):
        threads.add(threading.get_ident())
        return np.zeros(len(images))

    scores = weighted(far=Elsewhere(), home=at_home).score_groups(pictures(), PROMPTS, 2)
    assert threads == {threading.get_ident()}
    assert scores.valid.tolist() == [True, False, True]
    (line,) = scores.failures
    assert line.startswith("reward 'far', prompt 'one' (p.txt:2): RuntimeError: lost (")
    np.testing.assert_array_equal(scores.rewards[[0, 2]], [[0, 1], [4, 5]])


def test_a_part_may_be_missing_for_some_groups():
    def reward(images, prompts, metadata):
        return np.zeros(2), {"color": np.ones(2)} if prompts[0] == "one" else {}

    scores = weighted(r=reward).score_groups(pictures(), PROMPTS, 2)
    assert scores.valid.all()
    np.testing.assert_array_equal(scores.parts["r/color"], [[np.nan, np.nan], [1, 1], [np.nan, np.nan]])


def test_tensors_are_scores():
    import torch

    def model(images, prompts, metadata):
        scores = torch.arange(len(images), dtype=torch.bfloat16, requires_grad=True)
        return scores, {"doubled": 2 * scores}

    scores = weighted(model=model).score_groups(pictures(), PROMPTS, 2)
    assert not scores.failures
    np.testing.assert_array_equal(scores.parts["model/doubled"], [[0, 2]] * 3)


@pytest.mark.parametrize("error", [UserError("bad key"), KeyboardInterrupt()])
def test_what_is_no_failure_of_a_group_stops_the_run(error):
    def stop(images, prompts, metadata):
        raise error

    with pytest.raises(type(error)):
        weighted(stop=stop).score_groups(pictures(), PROMPTS, 2)


@given(st.integers(0, 4), st.integers(1, 4), st.data())
def test_shapes_and_validity_for_any_scores(groups, size, data):
    numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)
    table = np.array(data.draw(st.lists(numbers, min_size=groups * size, max_size=groups * size)), np.float32)
    rows = iter(table.reshape(groups, size))
    reward = WeightedReward({"r": lambda images, prompts, metadata: next(rows)}, {"r": 2.0})
    scores = reward.score_groups(pictures(groups * size), [Prompt("p")] * groups, size)
    with np.errstate(over="ignore"):
        expected = 2 * table.reshape(groups, size)
    finite = np.isfinite(expected).all(1)
    assert scores.rewards.shape == (groups, size) and scores.valid.shape == (groups,)
    np.testing.assert_array_equal(scores.valid, finite)
    np.testing.assert_array_equal(scores.rewards[finite], expected[finite])
    assert np.isnan(scores.rewards[~finite]).all() and len(scores.failures) == (~finite).sum()


def test_wrong_arguments_are_the_callers_mistake():
    reward = weighted(mean=mean)
    with pytest.raises(ValueError, match="6 images for 3 prompts of 3 images each"):
        reward.score_groups(pictures(), PROMPTS, 3)
    with pytest.raises(ValueError, match=re.escape("must be uint8 (B, H, W, 3), got float32 (6, 8, 8, 3)")):
        reward.score_groups(pictures().astype(np.float32), PROMPTS, 2)
    with pytest.raises(ValueError, match="got uint8"):
        reward.score_groups(pictures().transpose(0, 3, 1, 2), PROMPTS, 2)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("shapes", ("shapes", "shapes", 1)),
        ("ocr=0.5", ("ocr", "ocr", 0.5)),
        ("jpeg=-1", ("jpeg", "jpeg", -1)),
        ("m:R = 2e-1", ("m:R", "m:R", 0.2)),
        ("bright=m:R=2", ("bright", "m:R", 2)),
        ("taste=judge.yaml", ("taste", "judge.yaml", 1)),
        ("judges/mine.json=-1", ("judges/mine.json", "judges/mine.json", -1)),
        ("http://127.0.0.1:8000", ("http://127.0.0.1:8000", "http://127.0.0.1:8000", 1)),
        ("http://127.0.0.1:8000=0.5", ("http://127.0.0.1:8000", "http://127.0.0.1:8000", 0.5)),
        ("far=https://[::1]:8000/ocr=2", ("far", "https://[::1]:8000/ocr", 2)),
    ],
)
def test_specs(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize(
    "spec", ["", "=1", "ocr=", "ocr=much", "ocr=nan", "ocr=inf", "ocr=1=2", "ocr=shape", "a=b=m:R=1", "m:R=inf"]
)
def test_malformed_specs(spec):
    assert message(parse_spec, spec) == f"reward {spec!r}: write NAME or NAME=WEIGHT, for example ocr=0.5"


def test_where_weights_and_short_names_belong():
    """A weight beside its reward instead of behind it, and a short name of a reward that takes none."""
    said = "no reward '0.5': a weight is written {}=0.5, without a space"
    assert message(load_rewards, ["redness:Redness", "0.5"]) == said.format("redness:Redness")
    assert message(load_rewards, ["jpeg=0.1", "red=redness:Redness", "0.5"]) == said.format("red=redness:Redness")
    short = "reward 'red=jpeg': jpeg is shipped and takes no short name: write jpeg or jpeg=0.5"
    assert message(load_rewards, ["red=jpeg"]) == short
    assert message(load_rewards, ["red=jpeg=2"]) == short.replace("'red=jpeg'", "'red=jpeg=2'")


def test_registry_refuses_by_name():
    known = f"Name one of {', '.join(BUILT_IN)}, or your own as module:attribute"
    assert message(load_rewards, ["jpg"]) == f"no reward 'jpg': did you mean 'jpeg'? {known}"
    assert message(load_rewards, ["beauty"]) == f"no reward 'beauty': {known}"
    dotted = message(load_rewards, ["colour_rewards.Coverage"])
    assert dotted == f"no reward 'colour_rewards.Coverage': did you mean 'colour_rewards:Coverage'? {known}"
    assert message(load_rewards, ["jpeg", "jpeg=2"]) == "reward 'jpeg' is named twice: name it once, with its weight"
    expected = "no reward has a weight: name at least one, for example shapes or ocr=0.5"
    assert message(load_rewards, []) == message(load_rewards, ["jpeg=0"]) == expected


def test_prompts_are_refused_up_front():
    class Picky:
        def __call__(self, images, prompts, metadata):
            return np.zeros(len(images))

        def check_prompts(self, prompts):
            if prompts[0].tag != "t":
                raise UserError(f"{prompts[0].origin}: not for me")

    reward = weighted(mean=mean, picky=Picky())
    reward.check_prompts(PROMPTS[1:])
    assert message(reward.check_prompts, PROMPTS) == "p.txt:1: not for me"


def test_jpeg_counts_kilobytes():
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    images = np.concatenate([noise, np.full_like(noise, 7)])
    scores, parts = JpegReward()(images, [""] * 4, [{}] * 4)
    assert (scores[:2] < scores[2:]).all() and (scores < 0).all()
    for image, score, kilobytes in zip(images, scores, parts["kilobytes"], strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=95)
        assert kilobytes == pytest.approx(len(file.getvalue()) / 1000)
        assert score == pytest.approx(-len(file.getvalue()) / 1000 / 500)
    detailed = load_rewards(["jpeg=-2"]).score_groups(images, [Prompt("a")], 4)
    np.testing.assert_allclose(detailed.rewards[0], -2 * scores)
    assert set(detailed.parts) == {"jpeg", "jpeg/kilobytes"}


@pytest.mark.parametrize("name", ["jpeg", "ocr", "shapes"])
def test_shipped_rewards_that_need_no_download_load(name):
    assert callable(load_rewards([name]).rewards[name])
