"""The format of preferences: what docs/preferences.md says is what is read, and what cannot be used is named."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.preferences import (
    Judgement,
    append_judgement,
    groups_of,
    read_picture,
    read_preferences,
    require_pictures,
    split_preferences,
)

PAGE = (Path(__file__).parents[1] / "docs/preferences.md").read_text(encoding="utf-8")


def picture(path: Path, height: int = 8, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path


def written(folder: Path, *lines: object) -> Path:
    file = folder / "preferences.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_the_lines_that_the_page_shows_are_read(tmp_path: Path) -> None:
    lines = re.findall(r"^    (\{.*\})$", PAGE, re.MULTILINE)
    found = read_preferences(written(tmp_path, *lines))
    assert [judgement.kind for judgement in found] == ["pair", "rating", "rank", "like"]
    assert [judgement.value for judgement in found] == [1.0, 4.0, 1.0, 1.0]
    assert found[0].images == (tmp_path / "pictures/7.png", tmp_path / "pictures/8.png")
    assert found[3].prompt == Prompt("a photo of a blue star")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """From another folder, with a prompt's metadata and negative prompt, and with letters that are no ASCII."""
    prompt = Prompt("Käse “im” Glas", {"tag": "food", "include": [{"class": "jar", "count": 1}]}, negative="blurry")
    a, b = tmp_path / "pictures/a.png", tmp_path / "votes/b.png"
    said = [
        Judgement(prompt, "pair", (a, b)),
        Judgement(prompt, "rating", (a,), 3.5),
        Judgement(prompt, "rank", (b,), 2),
        Judgement(Prompt("a dog"), "like", (b,), 0.0),
        Judgement(Prompt("a dog"), "like", (a,), 1.0),
    ]
    file = tmp_path / "votes/preferences.jsonl"
    for judgement in said:
        append_judgement(file, judgement)
    assert read_preferences(tmp_path / "votes") == said
    assert '"win": "../pictures/a.png", "lose": "b.png"' in file.read_text(encoding="utf-8")


def test_groups_are_the_pictures_of_a_prompt_and_kind(tmp_path: Path) -> None:
    """Of any size; what is said twice of a picture is averaged; a ranking of two is a pair; ties share their places."""

    def line(prompt: str, image: str, **said: object) -> dict[str, object]:
        return {"prompt": prompt, "image": image, **said}

    file = written(
        tmp_path,
        line("x", "1.png", rating=1),
        line("y", "4.png", rank=1),
        line("x", "2.png", rating=5),
        {"prompt": "x", "win": "2.png", "lose": "1.png"},
        line("x", "1.png", rating=2),
        line("y", "5.png", rank=2),
        line("x", "3.png", rating=0.5),
        line("z", "6.png", rank=1),
        line("z", "7.png", rank=2),
        line("z", "8.png", rank=2),
        line("x", "2.png", like=True),
        line("x", "3.png", like=False),
        {"prompt": "x", "win": "2.png", "lose": "1.png"},
    )
    found = groups_of(read_preferences(file))
    assert [(group.prompt.text, group.kind, group.scores) for group in found] == [
        ("x", "rating", (1.5, 5.0, 0.5)),
        ("y", "rank", (1.0, -1.0)),
        ("x", "pair", (1.0, -1.0)),
        ("z", "rank", (1.0, -0.5, -0.5)),
        ("x", "like", (1.0, -1.0)),
        ("x", "pair", (1.0, -1.0)),
    ]
    assert [image.name for image in found[0].images] == ["1.png", "2.png", "3.png"]
    assert found[0].prompt.origin == f"{file}:1"


def test_a_folder_of_liked_and_disliked_pictures(tmp_path: Path) -> None:
    for side, name, text in (("liked", "1", "a cat\n"), ("disliked", "2", "a cat"), ("liked", "3", "a dog\non a mat")):
        picture(tmp_path / side / f"{name}.png")
        (tmp_path / side / f"{name}.txt").write_text(text)
    found = groups_of(read_preferences(tmp_path))
    assert [(group.prompt.text, group.scores) for group in found] == [
        ("a cat", (1.0, -1.0)),
        ("a dog on a mat", (1.0,)),
    ]
    (tmp_path / "liked/3.txt").unlink()
    with pytest.raises(UserError, match=r"3\.png: has no prompt: write it into 3\.txt beside it$"):
        read_preferences(tmp_path)
    (tmp_path / "liked/4.txt").write_text("a house")
    (tmp_path / "liked/3.txt").write_text("a dog")
    with pytest.raises(UserError, match=r"4\.txt: a prompt without a picture: put 4\.png beside it, or remove it$"):
        read_preferences(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "x", "win": "a.png"}', 'has "win" without "lose": a pair names both pictures'),
        ('{"prompt": "x", "lose": "a.png"}', 'has "lose" without "win": a pair names both pictures'),
        ('{"prompt": "x", "win": "a.png", "lose": "./a.png"}', "are the same picture"),
        ('{"prompt": "x", "win": "a.png", "lose": "b.png", "rating": 3}', "says more than a pair"),
        ('{"prompt": "x", "image": "a.png", "rating": "good"}', "\"rating\" is 'good' and no number"),
        ('{"prompt": "x", "image": "a.png", "rating": true}', "\"rating\" is 'True' and no number"),
        ('{"prompt": "x", "image": "a.png", "rating": NaN}', "NaN is no JSON"),
        ('{"prompt": "x", "image": "a.png", "rank": 0}', "write 1 for the best"),
        ('{"prompt": "x", "image": "a.png", "rank": 1.5}', "write 1 for the best"),
        ('{"prompt": "x", "image": "a.png", "like": 1}', "write true or false"),
        ('{"prompt": "x", "image": "a.png", "like": true, "rank": 1}', "says rank and like at once"),
        ('{"prompt": "x", "image": "a.png"}', "says nothing of the picture"),
        ('{"prompt": "x", "rating": 3}', 'names no picture: write "image": "cat.png"'),
        ('{"prompt": "x"}', "names no picture"),
        ('{"prompt": "x", "image": 5, "rating": 3}', '"image" is no file\'s name'),
        ('{"image": "a.png", "rating": 3}', 'lacks "prompt"'),
        ('{"prompt": "x", ', "broken JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, expected: str) -> None:
    good = '{"prompt": "x", "image": "a.png", "rating": 3}'
    with pytest.raises(UserError) as error:
        read_preferences(written(tmp_path, good, "", line))
    assert str(error.value).startswith(f"{tmp_path / 'preferences.jsonl'}:3: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_source_that_holds_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for source, expected in [
        (tmp_path, "holds neither preferences.jsonl nor pictures in liked/ and disliked/"),
        (tmp_path / "votes.jsonl", "no such file"),
        (tmp_path / "votes.csv", r"preferences are a \.jsonl file, or a folder"),
        (tmp_path / "empty.jsonl", r"empty\.jsonl: holds no preferences"),
    ]:
        with pytest.raises(UserError, match=expected):
            read_preferences(source)


def test_a_picture_that_cannot_be_used_is_named_with_its_line(tmp_path: Path) -> None:
    """Missing, broken, cut off in the middle, or of another size: one line, once the run's size is known."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "wide.png", 8, 16)
    (tmp_path / "broken.png").write_text("no picture")
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-60])
    for name, expected in [
        ("b.png", "no such picture: "),
        ("broken.png", "cannot be read"),
        ("wide.png", "has 8 high, 16 wide and the run 8 × 8 pixels: scale or crop the picture"),
    ]:
        file = written(tmp_path, {"prompt": "x", "win": "a.png", "lose": name})
        with pytest.raises(UserError) as error:
            require_pictures(read_preferences(file), (8, 8))
        assert str(error.value).startswith(f"{file}:1: ")
        assert expected in str(error.value)
    require_pictures(read_preferences(written(tmp_path, {"prompt": "x", "image": "a.png", "like": True})), (8, 8))
    with pytest.raises(UserError, match=r"^votes:7: .*cut\.jpg cannot be read"):
        read_picture(tmp_path / "cut.jpg", "votes:7")
    assert (read_picture(tmp_path / "a.png", "") == 90).all()


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    """Its size too, in the check and in the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(tmp_path / "a.png", exif=exif)
    require_pictures([Judgement(Prompt("x", origin="f:1"), "like", (tmp_path / "a.png",))], (16, 8))
    assert read_picture(tmp_path / "a.png", "").shape == (16, 8, 3)


def test_a_fifth_of_the_prompts_is_held_out_whole() -> None:
    """All that was said of a prompt is on one side; the order of the lines and their number change nothing."""
    said = [
        Judgement(Prompt(f"prompt {number % 20}"), "rating", (Path(f"{number}.png"),), float(number))
        for number in range(60)
    ]
    train, held_out, sets = split_preferences(said, 256)
    texts = [{judgement.prompt.text for judgement in some} for some in (train, held_out)]
    assert (len(train), len(held_out)) == (48, 12)
    assert not texts[0] & texts[1]
    assert texts[1] == {prompt.text for prompt in sets.held_out}
    again = split_preferences([replace(judgement, value=0.0) for judgement in reversed(said)], 256)[1]
    assert {judgement.prompt.text for judgement in again} == texts[1]
    few = split_preferences(said[:3], 256)
    assert few[0] == few[1] == said[:3]
    assert "too few prompts" in few[2].note
