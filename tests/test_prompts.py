"""Prompts: the generators' grammar and split, files of all kinds, and one clear line for each bad one."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt, load_prompts, quoted_text, require_geneval_metadata, require_quoted_text
from dgpo_fast.prompts.files import MAX_LINE_BYTES, read_prompts, split_held_out
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

GENERATED = ("geneval", "signs", "tiny-shapes", "tiny-signs")


def message(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


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


def map_all(tag: str) -> list[Prompt]:
    return [geneval_prompt(tag, index) for index in range(prompt_count(tag))]


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


def test_text_file(tmp_path):
    path = write(tmp_path / "p.txt", "\ufeffa cat\r\n\n  a dog \n\nça va\n" + "\n".join("abcdefg"))
    sets = load_prompts(path)
    texts = [p.text for p in sets.train + sets.held_out]
    assert sorted(texts) == sorted(["a cat", "a dog", "ça va", *"abcdefg"]) and len(sets.held_out) == 2
    origins = {p.text: p.origin for p in sets.train + sets.held_out}
    assert origins["a cat"] == f"{path}:1" and origins["a dog"] == f"{path}:3" and origins["g"] == f"{path}:12"
    assert {p.tag for p in sets.train} == {"all"}


def test_geneval_file(tmp_path):
    records = [geneval_prompt("counting", i).metadata for i in range(20)]
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, records)))
    sets = load_prompts(path)
    assert sorted(p.text for p in sets.train + sets.held_out) == sorted(r["prompt"] for r in records)
    assert all(p.metadata in records and p.tag == "counting" for p in sets.train)


@pytest.mark.parametrize(("header", "swapped"), [("Prompts,Category", False), ("tag, prompt", True)])
def test_csv_file(tmp_path, header, swapped):
    """DrawBench's columns, or ours, in either order; what else CSV has: quotes, commas, a byte order mark, CRLF."""
    rows = [("A red car.", "Colors"), ('"A sign, that says ""Go"""', "Text"), ("größe ü", '"a, b"')]
    lines = [header, *(f"{tag},{prompt}" if swapped else f"{prompt},{tag}" for prompt, tag in rows)]
    path = write(tmp_path / "d.csv", "\ufeff" + "\r\n\r\n".join(lines) + "\r\n")
    prompts = read_prompts(path)
    texts = ["A red car.", 'A sign, that says "Go"', "größe ü"]
    assert [(p.text, p.tag) for p in prompts] == list(zip(texts, ["Colors", "Text", "a, b"], strict=True))
    assert [p.origin for p in prompts] == [f"{path}:{number}" for number in (3, 5, 7)]
    assert prompts[0].metadata == {"prompt": "A red car.", "tag": "Colors"}
    (plain,) = read_prompts(write(tmp_path / "plain.csv", "PROMPT\na cat\n"))
    assert (plain.text, plain.tag, plain.metadata) == ("a cat", "all", {"prompt": "a cat"})


@pytest.mark.parametrize(
    ("name", "table", "expected"),
    [
        ("semicolons.csv", "prompt;tag\na red car, parked;colors\n", {"prompt": "a red car, parked", "tag": "colors"}),
        ("index.csv", ",Prompts,Category\n0,a cat,Colors\n", {"prompt": "a cat", "tag": "Colors"}),
        (
            "parti.tsv",
            'Prompt\tCategory\tChallenge\tNote\na sign, "Go", now\tText\tBasic\t\n',
            {"prompt": 'a sign, "Go", now', "tag": "Text", "Challenge": "Basic", "Note": ""},
        ),
        ("tabs.csv", "prompt\tseed\na cat\t7\n", {"prompt": "a cat", "seed": "7"}),
    ],
)
def test_tables_of_other_programs(tmp_path, name, table, expected):
    """Whatever separates the cells; further columns are metadata, and one without a name is an index."""
    (prompt,) = read_prompts(write(tmp_path / name, table))
    assert prompt.metadata == expected and prompt.text == expected["prompt"]


LINE_ENDS = ["\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_lines_end_as_any_program_ends_them(tmp_path, end):
    path = write(tmp_path / "lines.txt", end.join(["a cat", "", "a dog", "a bird "]) + end)
    assert [(p.text, p.origin) for p in read_prompts(path)] == [
        (text, f"{path}:{number}") for number, text in ((1, "a cat"), (3, "a dog"), (4, "a bird"))
    ]


def test_a_line_end_inside_json_is_part_of_the_prompt(tmp_path):
    path = write(tmp_path / "one.jsonl", '{"prompt": "a\u2028b"}\r{"prompt": "c"}')
    assert [p.text for p in read_prompts(path)] == ["a\u2028b", "c"]


@given(st.lists(st.sampled_from(["\r", "\n", "x", "x" * 70_000]), max_size=12))
def test_lines_do_not_depend_on_how_the_file_is_read(tmp_path_factory, pieces):
    """Python's own reading of the same bytes, in parts whose ends may lie between CR and LF."""
    content = "".join(pieces) or "x"
    path = write(tmp_path_factory.getbasetemp() / "parts.txt", content)
    whole = [line for line in content.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line]
    if any(len(line) > MAX_LINE_BYTES for line in whole):
        assert "line longer than" in message(read_prompts, path)
    elif whole:
        assert [p.text for p in read_prompts(path)] == whole


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), max_size=60))
def test_split_is_disjoint_complete_and_blind_to_order(texts):
    prompts = [Prompt(text) for text in texts]
    sets = split_held_out(prompts, 7)
    distinct = set(texts)
    if len(distinct) < 5:
        assert "too few prompts" in sets.note and sets.train == prompts and {p.text for p in sets.held_out} == distinct
        assert sets.evaluated == "training prompts"
        return
    held_out = [p.text for p in sets.held_out]
    assert len(held_out) == len(set(held_out)) == min(7, len(distinct) // 5)
    assert [p.text for p in sets.train] == [text for text in texts if text not in held_out]
    assert split_held_out(prompts[::-1], 7).held_out == sets.held_out


@pytest.mark.parametrize(
    ("prompts", "size", "evaluated"),
    [
        (8, 16, "1 held-out prompt (of 8)"),
        (49, 16, "9 held-out prompts (of 49)"),
        (50, 16, "held-out prompts"),
        (49, 9, "held-out prompts"),
    ],
    ids=["one", "nine", "enough", "as many as images"],
)
def test_few_held_out_prompts_are_counted(prompts, size, evaluated):
    sets = split_held_out([Prompt(f"prompt {number}") for number in range(prompts)], size)
    assert sets.evaluated == evaluated
    assert sets.note == (
        "" if evaluated == "held-out prompts" else f"evaluation uses {evaluated}: name more with --eval-prompts"
    )


def test_repeated_lines_count_as_repetitions_in_training_only(tmp_path):
    sets = load_prompts(write(tmp_path / "p.txt", "\n".join([*"abcdefghij"] * 3)))
    assert len(sets.held_out) == 2 and len(sets.train) == 24


def test_reworded_geneval_prompts_do_not_leak(tmp_path):
    records = [geneval_prompt("two_object", i).metadata for i in range(40)]
    reworded = [{**r, "prompt": r["prompt"].replace("a photo of", "this shows")} for r in records]
    sets = load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, records + reworded))))
    assert len(sets.held_out) == 8 and len(sets.train) == 80 - 16


def test_evaluation_file_is_kept_out_of_training(tmp_path):
    train = write(tmp_path / "train.txt", "\n".join("abcdef"))
    evaluation = write(tmp_path / "eval.txt", "\n".join("bxyz"))
    sets = load_prompts(train, eval_source=evaluation)
    assert [p.text for p in sets.train] == [*"acdef"] and sorted(p.text for p in sets.held_out) == [*"bxyz"]
    limited = load_prompts(train, eval_source=evaluation, held_out=2)
    assert [p.text for p in limited.train] == [*"acdef"] and len(limited.held_out) == 2
    assert limited.note == f"evaluation uses 2 of the 4 prompts in {evaluation}"
    assert load_prompts(train, eval_source="signs", held_out=3).held_out == sign_prompts(3).held_out


def test_official_prompts_are_kept_out_of_generated_training(tmp_path):
    # The same request in other words must not be trained on.
    ours = next(p for p in map_all("counting") if p.text == "a photo of two computer mice")
    official = {**ours.metadata, "prompt": "a photo of two computer mouses"}
    sets = load_prompts("geneval", eval_source=write(tmp_path / "e.jsonl", json.dumps(official)))
    assert len(sets.held_out) == 1 and ours.text not in {p.text for p in sets.train}


def test_unknown_source(tmp_path, monkeypatch):
    text = message(load_prompts, "genevl")
    assert text == (
        "no prompt source 'genevl': did you mean 'geneval'? "
        "Name one of geneval, signs, tiny-shapes, tiny-signs, or a .txt, .jsonl, .csv or .tsv file"
    )
    assert "did you mean" not in message(load_prompts, "zzzz")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", "{}")
    assert message(load_prompts, "train").startswith("no prompt source 'train': did you mean 'train.jsonl'? Name one ")


def test_bad_paths(tmp_path):
    missing = tmp_path / "none.txt"
    assert message(load_prompts, str(missing)) == (
        f"{missing}: no such prompt file: check the path (the working folder is {Path.cwd()})"
    )
    assert (
        message(load_prompts, str(tmp_path)) == f"{tmp_path}: is a folder: name a .txt, .jsonl, .csv or .tsv file in it"
    )
    other = write(tmp_path / "p.xlsx", "a cat")
    kinds = "use .txt (one prompt a line), .jsonl (GenEval), .csv (DrawBench) or .tsv (PartiPrompts)"
    assert message(load_prompts, other) == f"{other}: unknown kind of prompt file: {kinds}"
    assert message(load_prompts, "geneval", eval_source=str(missing)).startswith(f"{missing}: no such prompt file")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    path = write(tmp_path / "p.txt", "a cat")
    os.chmod(path, 0)
    assert message(load_prompts, path) == f"{path}: cannot be read: Permission denied"


COLUMNS_LEFT = 'one must be "prompt" (or "Prompts"), and at most one "tag" (or "Category")'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("e.txt", "", ": holds no prompts: write one prompt a line"),
        ("e.txt", " \n\r\n\t\n", ": holds no prompts: write one prompt a line"),
        ("u.txt", b"good\nbad \xff here\n", ":2: not UTF-8 at byte 9 of the file: save the file as UTF-8"),
        ("u.txt", "größe".encode("latin-1"), ":1: not UTF-8 at byte 2 of the file: save the file as UTF-8"),
        ("u.txt", "a cat".encode("utf-16"), ":1: not UTF-8 at byte 0 of the file: save the file as UTF-8"),
        ("l.txt", "ok\n" + "x" * (MAX_LINE_BYTES + 1), ":2: line longer than 100000 bytes: is this a prompt file?"),
        (
            "j.jsonl",
            '{"prompt": "a"}\n\n{"prompt": "b"\n',
            ":3: broken JSON (Expecting ',' delimiter at column 15): write one JSON object a line",
        ),
        ("j.jsonl", '{"prompt": "a"}\n"b"', ':2: not a JSON object: write {"prompt": "…", …}'),
        ("j.jsonl", '[\n{"prompt": "a"}\n]', ":1: is a JSON list: write one object a line, without [ ]"),
        ("j.jsonl", '[{"prompt": "a"}]', ":1: is a JSON list: write one object a line, without [ ]"),
        ("j.jsonl", "\n", ": holds no prompts: write one JSON object a line"),
        ("j.jsonl", '{"text": "a"}', ':1: lacks "prompt", a non-empty string: write {"prompt": "…", …}'),
        ("j.jsonl", '{"prompt": 3}', ':1: lacks "prompt", a non-empty string: write {"prompt": "…", …}'),
        ("j.jsonl", '{"prompt": " "}', ':1: lacks "prompt", a non-empty string: write {"prompt": "…", …}'),
        ("j.jsonl", '{"prompt": "\\ud83d"}', ":1: holds half a character (\\ud83d): write the letter itself"),
        ("j.jsonl", '{"prompt": "a\\u0000b"}', ':1: "prompt" holds a NUL character: leave it out'),
        ("n.txt", b"a cat\na\0dog\n", ":2: holds a NUL character: save the file as UTF-8 text"),
        ("n.txt", "a cat".encode("utf-16-le"), ":1: holds a NUL character: save the file as UTF-8 text"),
        (
            "j.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "tag": "x", "tag": "y"}',
            ":2: broken JSON (the key 'tag' occurs twice): write one JSON object a line",
        ),
        (
            "j.jsonl",
            '{"prompt": "a", "include": [{"class": "cat", "count": 1, "count": 2}]}',
            ":1: broken JSON (the key 'count' occurs twice): write one JSON object a line",
        ),
        ("j.jsonl", '{"prompt": "a", "weight": NaN}', ":1: broken JSON (NaN is no JSON): write one JSON object a line"),
        (
            "j.jsonl",
            '{"prompt": "a"}\n{"prompt": "a", "include": [{"class": "cat", "count": -1e999}]}',
            ":2: broken JSON ('-1e999' is beyond all numbers): write one JSON object a line",
        ),
        (
            "j.jsonl",
            '{"prompt": "a", "tag": "\\ud83d"}',
            ":1: holds half a character (\\ud83d): write the letter itself",
        ),
        (
            "j.jsonl",
            '{"prompt": "a", "more": [{"\\udc00": 1}]}',
            ":1: holds half a character (\\udc00): write the letter itself",
        ),
        (
            "j.jsonl",
            '{"prompt": "a", "tag": ["counting"]}',
            ':1: "tag" is no string: write a name, as in "tag": "counting"',
        ),
        ("c.csv", "", ': holds no prompts: write the line "prompt,tag", and a prompt with its tag in each line below'),
        (
            "c.csv",
            "prompt\n\n",
            ': holds no prompts: write the line "prompt,tag", and a prompt with its tag in each line below',
        ),
        ("c.csv", "\na cat,Colors\n", ":2: names the columns 'a cat, Colors': " + COLUMNS_LEFT),
        ("c.csv", "Text;Category\na;b\n", ":1: names the columns 'Text, Category': " + COLUMNS_LEFT),
        ("c.csv", "prompt,seed,seed\na,1,2\n", ":1: two columns are called 'seed': rename one of them"),
        ("t.tsv", "prompt\ttag\na\tb\tc\n", ":2: 3 cells below 2 columns: leave tabs out of the prompt"),
        ("c.csv", "prompt,Prompts\na,b\n", ":1: names the columns 'prompt, Prompts': " + COLUMNS_LEFT),
        ("c.csv", "Category\nColors\n", ":1: names the columns 'Category': " + COLUMNS_LEFT),
        (
            "c.csv",
            "Prompts,Category\na,b\na cat, asleep,Colors\n",
            ":3: 3 cells below 2 columns: write a prompt that holds commas between double quotes",
        ),
        (
            "c.csv",
            "prompt,tag\na cat\n",
            ":2: 1 cell below 2 columns: write a prompt that holds commas between double quotes",
        ),
        (
            "c.csv",
            "Prompts,Category\n ,Colors\n",
            ":2: nothing in the column 'Prompts': fill it in, or remove the line",
        ),
        ("c.csv", "Prompts,Category\na,\n", ":2: nothing in the column 'Category': fill it in, or remove the line"),
        (
            "c.csv",
            'prompt,tag\n"a cat\nasleep",x\n',
            ":2: broken CSV (unexpected end of data): end each cell on its line, and double the quotes inside quotes",
        ),
        (
            "c.csv",
            'prompt,tag\n"a "cat",x\n',
            ":2: broken CSV (',' expected after '\"'): end each cell on its line, and double the quotes inside quotes",
        ),
        ("c.csv", b"prompt\n\xff\n", ":2: not UTF-8 at byte 7 of the file: save the file as UTF-8"),
    ],
)
def test_bad_files(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    assert message(load_prompts, path) == path + expected


@pytest.mark.parametrize("line", ['{"prompt": ' + "[" * 50_000, '{"prompt": ' + "9" * 5_000 + "}"])
def test_json_that_python_refuses_is_broken_json(tmp_path, line):
    path = write(tmp_path / "j.jsonl", line)
    assert message(load_prompts, path).startswith(f"{path}:1: broken JSON (")


def test_longest_line_is_accepted(tmp_path):
    sets = load_prompts(write(tmp_path / "l.txt", "x" * MAX_LINE_BYTES + "\r\n"))
    assert len(sets.train[0].text) == MAX_LINE_BYTES


@given(st.binary(max_size=300))
def test_any_bytes_give_prompts_or_one_line(tmp_path_factory, content):
    for name in ("f.txt", "f.jsonl", "f.csv", "f.tsv"):
        path = write(tmp_path_factory.getbasetemp() / name, content)
        try:
            sets = load_prompts(path)
        except UserError as error:
            assert str(error).startswith(path) and "\n" not in str(error)
        else:
            assert sets.train and sets.held_out


# Half characters and numbers beyond all others among them, wherever JSON may have them.
TEXT = st.text(st.characters(exclude_categories=()), max_size=9)
JSON = st.recursive(
    TEXT | st.floats(allow_nan=False) | st.integers(-(10**30), 10**30) | st.booleans() | st.none(),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(TEXT, inside, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXT, JSON, max_size=3), TEXT)
def test_what_a_line_holds_can_be_written_again(tmp_path_factory, metadata, tag):
    """As JSON without escapes, which a run's files and its console are; or it is refused in one line."""
    line = json.dumps({**metadata, "prompt": "a", "tag": tag}).replace("Infinity", "1e999")
    path = write(tmp_path_factory.getbasetemp() / "again.jsonl", line)
    try:
        (prompt,) = read_prompts(path)
    except UserError as error:
        assert str(error).startswith(f"{path}:1: ") and str(error).isprintable()
    else:
        json.dumps([prompt.text, prompt.tag, prompt.metadata], ensure_ascii=False, allow_nan=False).encode()


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
