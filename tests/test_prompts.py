"""Prompts: the generators' grammar and split, files of all kinds, and one clear line for each bad one."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.prompts import Prompt, load_prompts, quoted_text, require_geneval_metadata, require_quoted_text
from dgpo_fast.prompts.files import read_prompts
from dgpo_fast.prompts.geneval import (
    CLASSES,
    COLORS,
    COUNTS,
    RELATIONS,
    TAGS,
    TRAINING_MIX,
    geneval_prompt,
    geneval_prompts,
    plural,
    prompt_count,
    with_article,
)
from dgpo_fast.prompts.prompt import in_proportion
from dgpo_fast.prompts.signs import sign_prompts
from tests.texts import map_all, message, write

GENERATED = ("geneval", "signs", "tiny-shapes", "tiny-signs")


def test_importing_is_light():
    code = (
        "import sys, dgpo_fast.prompts, dgpo_fast.rewards; "
        "print([m for m in ('torch', 'rapidocr', 'onnxruntime', 'cv2', 'scipy', 'PIL') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("source", GENERATED)
def test_generators_hold_out_what_they_do_not_train_on(source):
    sets = load_prompts(source, held_out=100)
    assert len(sets.held_out) == 100 and not sets.note
    assert not {p.text for p in sets.train} & {p.text for p in sets.held_out}
    assert not {p.content for p in sets.train} & {p.content for p in sets.held_out}
    assert load_prompts(source, held_out=100) == sets
    assert load_prompts(source).held_out != sets.held_out


def test_geneval_trains_on_the_published_mix_and_evaluates_all_tags_alike():
    sets = geneval_prompts()
    tags = Counter(p.tag for p in sets.train)
    assert tags == {tag: 2000 * weight for tag, weight in TRAINING_MIX.items()}
    assert len({p.text for p in sets.train}) > 20_000
    repeats = Counter(p.text for p in sets.train if p.tag == "counting").values()
    assert max(repeats) - min(repeats) <= 1
    evaluated = Counter(p.tag for p in sets.held_out)
    assert set(evaluated) == set(TAGS) and max(evaluated.values()) - min(evaluated.values()) <= 1
    assert len(set(sets.held_out)) == len(sets.held_out) == 256


def test_geneval_seed_moves_training_but_not_evaluation():
    a, b = geneval_prompts(seed=1, per_weight=10), geneval_prompts(seed=2, per_weight=10)
    assert a.train != b.train and a.held_out == b.held_out
    assert geneval_prompts(seed=1, per_weight=10) == a


def test_geneval_asked_for_more_than_there_is_leaves_prompts_to_train_on():
    sets = geneval_prompts(held_out=100_000, per_weight=10)
    held_out = Counter(p.tag for p in sets.held_out)
    assert held_out["single_object"] == 80 and held_out["counting"] == 48
    assert Counter(p.tag for p in sets.train)["counting"] == 50


@given(st.sampled_from(TAGS), st.data())
def test_geneval_metadata_says_what_the_text_says(tag, data):
    prompt = geneval_prompt(tag, data.draw(st.integers(0, prompt_count(tag) - 1)))
    metadata = prompt.metadata
    assert metadata["tag"] == prompt.tag == tag and metadata["prompt"] == prompt.text
    assert json.loads(json.dumps(metadata)) == metadata
    phrases = []
    for wanted in metadata["include"]:
        assert wanted["class"] in CLASSES
        assert wanted.get("color", "red") in COLORS
        assert not ("color" in wanted and wanted["class"] == "person")
        if wanted["count"] == 1:
            phrases.append(with_article(wanted["class"], wanted.get("color", "")))
        else:
            phrases.append(f"{COUNTS[wanted['count']]} {plural(wanted['class'])}")
    if tag == "position":
        relation, landmark = metadata["include"][1]["position"]
        assert relation in RELATIONS and landmark == 0
        assert prompt.text == f"a photo of {phrases[1]} {relation} {phrases[0]}"
    else:
        assert prompt.text == f"a photo of {' and '.join(phrases)}"


def test_geneval_prompts_match_the_published_format():
    by_text = {p.text: p.metadata for tag in ("counting", "colors") for p in map_all(tag)}
    assert by_text["a photo of two clocks"] == {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    }
    assert by_text["a photo of a pink car"] == {
        "tag": "colors",
        "include": [{"class": "car", "count": 1, "color": "pink"}],
        "prompt": "a photo of a pink car",
    }
    dog_and_tie = next(p for p in map_all("position") if p.text == "a photo of a dog right of a tie")
    assert dog_and_tie.metadata["include"] == [
        {"class": "tie", "count": 1},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
    ]


@pytest.mark.parametrize(
    ("tag", "count"),
    [("single_object", 80), ("two_object", 80 * 79), ("counting", 240), ("colors", 790), ("position", 80 * 79 * 4)],
)
def test_geneval_prompts_of_a_tag_are_distinct(tag, count):
    assert len({p.text for p in map_all(tag)}) == prompt_count(tag) == count


def test_no_two_objects_of_one_color_or_class():
    assert prompt_count("color_attr") == 79 * 78 * 10 * 9
    for index in range(0, prompt_count("color_attr"), 997):
        a, b = geneval_prompt("color_attr", index).metadata["include"]
        assert a["class"] != b["class"] and a["color"] != b["color"]


def test_geneval_english():
    assert len(set(CLASSES)) == 80
    articles = {with_article(name) for name in CLASSES}
    assert {"an apple", "an umbrella", "an oven", "a person", "a pair of skis", "a head of broccoli"} <= articles
    assert with_article("apple", "red") == "a red apple" and with_article("car", "orange") == "an orange car"
    plurals = {plural(name) for name in CLASSES}
    assert {"buses", "benches", "wine glasses", "toothbrushes", "knives", "sheep", "people", "computer mice"} <= plurals
    assert {"pairs of scissors", "heads of broccoli", "hot dogs", "vases", "pizzas"} <= plurals


def test_signs_are_thousands_of_quoted_distinct_phrases():
    sets = sign_prompts()
    assert len(sets.train) == len({p.metadata["text"].lower() for p in sets.train}) == 20_000
    require_quoted_text(sets.train + sets.held_out)
    for prompt in sets.train + sets.held_out:
        assert quoted_text(prompt.text) == prompt.metadata["text"] and len(prompt.metadata["text"]) <= 20
        assert prompt.tag == "ocr" and re.fullmatch(r'[a-z0-9 \-]+ "[A-Za-z0-9 ]+"[a-z ]*', prompt.text), prompt.text
    trained = {p.metadata["text"].lower() for p in sets.train}
    assert not trained & {p.metadata["text"].lower() for p in sets.held_out}
    assert len({p.text.split('"')[2] for p in sets.train}) > 15
    assert sign_prompts(seed=1).train != sets.train and sign_prompts(seed=1).held_out == sets.held_out


def test_asking_for_all_signs_gives_them_all():
    sets = sign_prompts(held_out=10**6, train=10**6)
    assert len(sets.train) > 40_000 and len(sets.held_out) > 4_000


def test_in_proportion_by_hand():
    prompts = [Prompt(t, {"tag": t[0]}) for t in ("a1", "a2", "a3", "b1", "c1")]
    assert [p.text for p in in_proportion(prompts, {"a": 2, "b": 1})] == ["a1", "a2", "a3", "a1", "b1", "b1"]


def test_evaluation_that_leaves_nothing_to_train_on(tmp_path):
    path = write(tmp_path / "p.txt", "a\nb")
    expected = f"{path}: every prompt is also in {path}: name a different file for evaluation"
    assert message(load_prompts, path, eval_source=path) == expected
    assert message(load_prompts, path, held_out=0) == "held_out must be at least 1, got 0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('says "open late" and "closed"', "open late"),
        ("says nothing", None),
        ('half a "pair', None),
        ('a 12" ruler beside a sign that says "OPEN"', "OPEN"),
        ("a 5'10\" man with a shirt that says “HI”", "HI"),
        ('a "quaint" shop with the words: "fresh bread"', "fresh bread"),
        ('a 12" ruler and a 6" nail', " ruler and a 6"),
        ('a 12" ruler', None),
        ('a sign that says ""', None),
        ('""', None),
        ('" "', None),
    ],
)
def test_quoted_text(text, expected):
    assert quoted_text(text) == expected


def test_prompts_without_quoted_text_are_named(tmp_path):
    path = write(tmp_path / "p.txt", 'a sign that says "open"\na sign\n')
    prompts = load_prompts(path).train
    assert message(require_quoted_text, prompts) == (
        f"{path}:2: no text between double quotes in 'a sign': "
        'write the words to be drawn like this: a sign that says "open"'
    )
    assert message(require_quoted_text, [Prompt('a sign that says ""')]).startswith("prompt: no text between double")
    odd = "no pair of double quotes after a word such as says, and an odd number of them"
    assert message(require_quoted_text, [Prompt('a 12" ruler', origin="p.txt:3")]).startswith(f"p.txt:3: {odd} in 'a ")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({}, 'no list "include" of what to draw'),
        ({"include": []}, 'no list "include" of what to draw'),
        ({"include": {"class": "cat"}}, 'no list "include" of what to draw'),
        ({"include": [{"count": 1}]}, 'an entry without "class"'),
        ({"include": ["cat"]}, 'an entry without "class"'),
        ({"include": [{"class": "cat"}]}, "\"count\" of 'cat' is no number from 1 up"),
        ({"include": [{"class": "cat", "count": 0}]}, "\"count\" of 'cat' is no number from 1 up"),
        ({"include": [{"class": "cat", "count": True}]}, "\"count\" of 'cat' is no number from 1 up"),
        ({"include": [{"class": "cat", "count": 1, "color": 3}]}, "\"color\" of 'cat' is no name"),
        ({"include": [{"class": "cat", "count": 1}], "exclude": 3}, '"exclude" is no list'),
        ({"include": [{"class": "cat", "count": 1}], "exclude": [3]}, 'an entry without "class"'),
    ],
)
def test_metadata_that_is_not_genevals(metadata, problem):
    text = message(require_geneval_metadata, [Prompt("a cat", metadata, "p.jsonl:7")])
    assert text.startswith(f"p.jsonl:7: {problem}: write GenEval metadata such as {{")
    assert message(require_geneval_metadata, [Prompt("a cat", metadata)]).startswith("'a cat': ")


@pytest.mark.parametrize(
    "position", [None, "left of", ["left of"], ["left of", 1], ["left of", -1], [0, 0], ["above", True]]
)
def test_position_must_name_an_earlier_entry(position):
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": position}]
    text = message(require_geneval_metadata, [Prompt("", {"include": include})])
    assert "\"position\" of 'cat' is no pair of a relation and the number of an earlier entry" in text


@pytest.mark.parametrize("source", ["geneval", "tiny-shapes"])
def test_generated_metadata_is_genevals(source):
    sets = load_prompts(source)
    require_geneval_metadata(sets.train + sets.held_out)


def test_names_too_long_for_a_file_are_unknown_sources():
    assert message(load_prompts, "x" * 5000).startswith("no prompt source 'xxx")
    assert "no such prompt file" in message(load_prompts, "x" * 5000 + ".txt")


def test_the_guide_counts_right():
    guide = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")
    for source in ("geneval", "signs"):
        row = next(line for line in guide.splitlines() if line.startswith(f"| `{source}`"))
        distinct = len({prompt.text for prompt in load_prompts(source, held_out=512).train})
        assert f"{round(distinct, -2):,} distinct" in row


def test_the_guide_shows_valid_files(tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in guide.splitlines() if line.startswith('    {"prompt"')]
    sets = load_prompts(write(tmp_path / "p.jsonl", "\n".join(lines)))
    assert len(sets.train) == 2
    require_geneval_metadata(sets.train)
    (table,) = re.findall(r"(    Prompts,Category\n(?:    .*\n)+)", guide)
    drawbench = read_prompts(write(tmp_path / "p.csv", table.replace("    ", "")))
    assert [p.tag for p in drawbench] == ["Colors", "Text"] and quoted_text(drawbench[1].text) == "open"
