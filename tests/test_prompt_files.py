"""Prompt files of all kinds, what is held out of them, and one clear line for each bad one."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt, load_prompts
from dgpo_fast.prompts.files import MAX_LINE_BYTES, read_prompts, split_held_out
from dgpo_fast.prompts.geneval import geneval_prompt
from dgpo_fast.prompts.signs import sign_prompts
from tests.texts import map_all, message, write


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mac.csv", 'prompt,tag\ra cat,x\r"a dog, red",y\r'),
        ("mac.tsv", "Prompt\tCategory\ra cat\tx\ra dog, red\ty"),
        ("mac.jsonl", '{"prompt": "a cat"}\r{"prompt": "a dog, red"}\r'),
        ("joined.txt", "\ufeffa cat\n\ufeffa dog, red\n"),
        ("joined.jsonl", '\ufeff{"prompt": "a cat"}\n\ufeff{"prompt": "a dog, red"}\n'),
    ],
)
def test_tables_and_joined_files_of_other_programs(tmp_path, name, content):
    """Lines that end in CR alone, and a byte order mark at the start of each of the files that were joined."""
    assert [p.text for p in read_prompts(write(tmp_path / name, content))] == ["a cat", "a dog, red"]


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
