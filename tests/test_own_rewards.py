"""Rewards of a user's own: by import path, and what is said of those that fail."""

import sys

import numpy as np
import pytest

from dgpo_fast.rewards import load_rewards
from tests.reward_cases import PROMPTS, pictures
from tests.texts import message

OWN_REWARDS = """
import functools
from dgpo_fast.errors import UserError

class Constant:
    def __init__(self, value=3.0):
        self.value = value
    def __call__(self, images, prompts, metadata):
        return [self.value] * len(images)

def make():
    return Constant(4.0)

def function(images, prompts, metadata):
    return [5.0] * len(images)

def with_defaults(images=(), prompts=(), metadata=()):
    return [6.0] * len(images)

instance = Constant(7.0)
bound = functools.partial(function)
number = 8

def two_arguments(images, prompts):
    return [0.0]

class Broken:
    def __init__(self):
        raise RuntimeError("no weights\\nat all")

class NeedsKey:
    def __init__(self):
        raise UserError("set MY_KEY")

class Sick(Constant):
    def self_test(self):
        assert self([0], [""], [{}]) == [1.0], "golden score"

class NeedsPath(Constant):
    def __init__(self, path, size=3, *, key):
        pass

class Checks(Constant):
    def check_prompts(self, prompts):
        return [prompt.metadata["nosuch"] for prompt in prompts]

class NotCallable:
    pass
"""


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN_REWARDS)
    (tmp_path / "broken_module.py").write_text("x = 1\nimport no_such_dependency\n")
    (tmp_path / "bad_syntax.py").write_text("x = (\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("own_rewards", "broken_module"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("attribute", "score"),
    [("Constant", 3), ("make", 4), ("function", 5), ("with_defaults", 6), ("instance", 7), ("bound", 5)],
)
def test_own_rewards_by_import_path(own_rewards, attribute, score):
    name = f"own_rewards:{attribute}"
    scores = load_rewards([f"{name}=2", "jpeg=0"]).score_groups(pictures(2), PROMPTS[:1], 2)
    np.testing.assert_array_equal(scores.rewards, [[2 * score, 2 * score]])
    np.testing.assert_array_equal(scores.parts[name], [[score, score]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own_reward:make", "no module 'own_reward' in the working folder or among installed packages"),
        ("no.such.package:make", "no module 'no.such.package' in the working folder or among installed packages"),
        ("own_rewards:Constnat", "module 'own_rewards' has no 'Constnat': did you mean 'Constant'?"),
        ("own_rewards:", "write module:attribute as in an import, for example my_reward:Brightness"),
        (".own_rewards:make", "write module:attribute as in an import, for example my_reward:Brightness"),
        ("own_rewards.py:make", "write module:attribute as in an import, for example my_reward:Brightness"),
        ("./own_rewards:make", "write module:attribute as in an import, for example my_reward:Brightness"),
        ("own_rewards.sub:make", "no module 'own_rewards.sub' in the working folder or among installed packages"),
        ("own_rewards:number", "must be callable as reward(images, prompts, metadata)"),
        ("own_rewards:two_arguments", "must be callable as reward(images, prompts, metadata)"),
        ("own_rewards:NotCallable", "must be callable as reward(images, prompts, metadata)"),
        (
            "own_rewards:NeedsPath",
            "a class is made without arguments: give 'path' and 'key' a default, or name a "
            "function that returns the reward",
        ),
    ],
)
def test_own_rewards_that_are_none(own_rewards, name, expected):
    assert message(load_rewards, [name]) == f"reward {name!r}: {expected}"


def test_own_rewards_that_fail_say_where(own_rewards):
    path = own_rewards / "own_rewards.py"
    assert message(load_rewards, ["own_rewards:NeedsKey"]) == "set MY_KEY"
    assert message(load_rewards, ["own_rewards:Broken"]) == (
        f"reward 'own_rewards:Broken' cannot be made: RuntimeError: no weights at all ({path}, line 29)"
    )
    assert message(load_rewards, ["own_rewards:Sick"]) == (
        f"reward 'own_rewards:Sick' failed its self-test: AssertionError: golden score ({path}, line 37)"
    )
    assert message(load_rewards, ["bad_syntax:f"]) == (
        "reward 'bad_syntax:f' cannot be imported: SyntaxError: '(' was never closed (bad_syntax.py, line 1)"
    )
    checking = load_rewards(["own_rewards:Checks"]).check_prompts
    assert message(checking, PROMPTS) == (
        f"reward 'own_rewards:Checks' cannot check the prompts: KeyError: 'nosuch' ({path}, line 45)"
    )
    text = message(load_rewards, ["broken_module:Reward"])
    assert text.startswith(
        "reward 'broken_module:Reward' cannot be imported: ModuleNotFoundError: No module named 'no_such_dependency' ("
    )
    assert text.endswith(f"{own_rewards / 'broken_module.py'}, line 2)")


def test_a_place_in_the_working_folder_has_a_short_name(own_rewards, monkeypatch):
    monkeypatch.chdir(own_rewards)
    expected = "reward 'own_rewards:Broken' cannot be made: RuntimeError: no weights at all (own_rewards.py, line 29)"
    assert message(load_rewards, ["own_rewards:Broken"]) == expected
