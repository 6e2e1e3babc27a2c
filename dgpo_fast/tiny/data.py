"""The miniature world: every prompt, its metadata and a picture that satisfies it.

Coloured shapes on a plain background ask for what GenEval asks for (six tags, metadata in GenEval's format); signs
carry three-letter words for OCR. Pictures are uint8 RGB of shape (32, 32, 3).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import permutations, product
from typing import Literal

import numpy as np
from PIL import Image

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import in_turn
from dgpo_fast.records import Metadata

Prompt = tuple[str, Metadata]
Split = Literal["train", "heldout"]

SIZE = 32
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Equal chroma (max − min channel, about 175) so that one threshold segments them all, hues at least 25° apart.
COLORS = {
    "red": (222, 45, 50),
    "orange": (245, 140, 65),
    "yellow": (236, 222, 56),
    "green": (35, 205, 70),
    "blue": (45, 80, 222),
    "purple": (160, 45, 215),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# How often a tag is drawn in training: tags with more to learn more often, none rarely, since evaluation counts them
# alike. GenEval's published mix (7 of 17 parts position) learns its few position scenes by heart instead.
TAG_MIX = {"single_object": 1, "two_object": 2, "counting": 2, "colors": 2, "position": 3, "color_attr": 3}
HELDOUT_SHARE = 0.25

# Object sizes in pixels by the number of objects. Boxes start on a grid of one latent cell, so that a shape has one set
# of latents wherever it stands: minutes of pretraining on a CPU then suffice.
_SIZES = {1: 14, 2: 10, 3: 10, 4: 10}
_CELL = 4
_MARGIN = 1
_GAP = 2
# One hexadecimal pair per row of a 5 × 7 glyph, most significant of five bits on the left.
_FONT = {
    "A": "0E11111F111111",
    "B": "1E11111E11111E",
    "C": "0E11101010110E",
    "D": "1E11111111111E",
    "E": "1F10101E10101F",
    "F": "1F10101E101010",
    "G": "0E11101711110F",
    "H": "1111111F111111",
    "I": "0E04040404040E",
    "J": "0702020202120C",
    "K": "11121418141211",
    "L": "1010101010101F",
    "M": "111B1515111111",
    "N": "11191915131311",
    "O": "0E11111111110E",
    "P": "1E11111E101010",
    "Q": "0E11111115120D",
    "R": "1E11111E141211",
    "S": "0F10100E01011E",
    "T": "1F040404040404",
    "U": "1111111111110E",
    "V": "11111111110A04",
    "W": "1111111515150A",
    "X": "11110A040A1111",
    "Y": "11110A04040404",
    "Z": "1F01020408101F",
}
_CONSONANTS, _VOWELS = "BCDFGHJKLMNPQRSTVWXYZ", "AEIOU"


def all_prompts() -> list[Prompt]:
    """Every distinct shape prompt with its GenEval metadata, tag by tag in the order of `TAGS`."""
    prompts = [_prompt("single_object", f"a {a}", [_include(a)]) for a in SHAPES]
    for a, b in permutations(SHAPES, 2):
        prompts.append(_prompt("two_object", f"a {a} and a {b}", [_include(a), _include(b)]))
    for a, (count, word) in product(SHAPES, NUMBERS.items()):
        plural = f"{a}es" if a.endswith("s") else f"{a}s"
        exclude = [{"class": a, "count": count + 1}]
        prompts.append(_prompt("counting", f"{word} {plural}", [_include(a, count)], exclude))
    for a, color in product(SHAPES, COLORS):
        prompts.append(_prompt("colors", f"{_article(color)} {a}", [_include(a, color=color)]))
    for (a, b), relation in product(permutations(SHAPES, 2), RELATIONS):
        include = [_include(b), _include(a, position=[relation, 0])]
        prompts.append(_prompt("position", f"a {a} {relation} a {b}", include))
    for (a, b), (c, d) in product(permutations(SHAPES, 2), permutations(COLORS, 2)):
        include = [_include(a, color=c), _include(b, color=d)]
        prompts.append(_prompt("color_attr", f"{_article(c)} {a} and {_article(d)} {b}", include))
    return prompts


def all_signs() -> list[Prompt]:
    """Every sign prompt, `a sign that says "CAT"`: three letters, vowels and consonants in turn."""
    words = ["".join(w) for w in (*product(_CONSONANTS, _VOWELS, _CONSONANTS), *product(_VOWELS, _CONSONANTS, _VOWELS))]
    prompts = []
    # The vocabulary has the names of colours as whole words, without their letters.
    for word in (w for w in words if w.lower() not in COLORS):
        text = f'a sign that says "{word}"'
        prompts.append((text, {"tag": "ocr", "text": word, "prompt": text}))
    return prompts


def split(prompts: Iterable[Prompt]) -> dict[Split, list[Prompt]]:
    """Parts prompts into train and held-out, the same way in every run.

    A quarter of the *scenes* of every tag, and at least two, is held out: "a circle and a square" and "a square and a
    circle", or "above" and its mirror "below", are one scene and stay on one side.
    """
    scenes: dict[str, dict[str, list[Prompt]]] = {}
    for prompt in prompts:
        scenes.setdefault(prompt[1]["tag"], {}).setdefault(_scene(prompt[1]), []).append(prompt)
    parts: dict[Split, list[Prompt]] = {"train": [], "heldout": []}
    for by_scene in scenes.values():
        order = sorted(by_scene, key=lambda scene: hashlib.sha256(scene.encode()).digest())
        n_heldout = max(2, round(HELDOUT_SHARE * len(order)))
        heldout = set(order[:n_heldout])
        for scene, same in by_scene.items():
            parts["heldout" if scene in heldout else "train"] += same
    return parts


def shape_prompts(part: Split) -> list[Prompt]:
    """The distinct shape prompts of `part` ("train" or "heldout") as (prompt, metadata)."""
    return split(all_prompts())[_checked(part)]


def sign_prompts(part: Split) -> list[Prompt]:
    """The distinct sign prompts of `part` ("train" or "heldout") as (prompt, metadata)."""
    return split(all_signs())[_checked(part)]


def weights(prompts: Sequence[Prompt], mix: Mapping[str, float] | None = None) -> np.ndarray:
    """Probability of each prompt, float64 (P,), such that tags come in the proportions of `mix` (equal if None).

    Tags that `mix` does not name are not drawn; a tag without prompts gives its share to the others.
    """
    tags = [metadata["tag"] for _, metadata in prompts]
    share = mix or dict.fromkeys(tags, 1.0)
    p = np.array([share.get(tag, 0.0) / tags.count(tag) for tag in tags])
    if not p.sum() > 0:
        raise UserError(f"no prompt has a tag of the mix {sorted(share)}: add prompts of these tags or change the mix")
    return p / p.sum()


def balanced(prompts: Sequence[Prompt], n: int) -> list[Prompt]:
    """`n` prompts, the tags in turn; each tag's prompts in a fixed shuffled order, over again if there are too few."""
    shuffled = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt[0].encode()).digest())
    return in_turn(shuffled, lambda prompt: prompt[1]["tag"], n)


def render(metadata: Metadata, rng: np.random.Generator) -> np.ndarray:
    """Draws a picture that satisfies `metadata`, uint8 (32, 32, 3); what it leaves open, `rng` decides.

    Raises:
        UserError: the metadata names a tag, shape, colour or relation that this world lacks.
    """
    if metadata.get("tag") == "ocr":
        return _render_sign(metadata["text"], rng)
    return _render_shapes(metadata, rng)


def misspell(word: str, share: float, rng: np.random.Generator) -> str:
    """`word` with each letter replaced, with probability `share`, by any letter of the alphabet."""
    others = rng.choice(list(_FONT), size=len(word))
    wrong = rng.random(len(word)) < share
    return "".join(np.where(wrong, others, list(word)))


def coverage(shape: str, size: int) -> np.ndarray:
    """How much of each pixel of a (size, size) box the shape covers, float64 in [0, 1]."""
    return _coverage(shape, size).copy()


def _prompt(tag: str, phrase: str, include: list[Metadata], exclude: list[Metadata] | None = None) -> Prompt:
    text = f"a photo of {phrase}"
    metadata: Metadata = {"tag": tag, "include": include}
    if exclude:
        metadata["exclude"] = exclude
    return text, {**metadata, "prompt": text}


def _include(shape: str, count: int = 1, **more: object) -> Metadata:
    return {"class": shape, "count": count, **more}


def _article(color: str) -> str:
    return f"an {color}" if color[0] in "aeiou" else f"a {color}"


def _checked(part: Split) -> Split:
    if part not in ("train", "heldout"):
        raise UserError(f"there is no split {part!r}: use 'train' or 'heldout'")
    return part


def _scene(metadata: Metadata) -> str:
    """A name that two prompts share exactly when the same pictures satisfy them."""
    if metadata["tag"] == "ocr":
        return f"ocr {metadata['text']}"
    names = [f"{o['count']} {o.get('color', '')} {o['class']}" for o in metadata["include"]]
    if metadata["tag"] != "position":
        return f"{metadata['tag']} {sorted(names)}"
    relation, _ = metadata["include"][1]["position"]
    first, second = names[1], names[0]
    mirror = {"right of": "left of", "below": "above"}
    return f"{second} {mirror[relation]} {first}" if relation in mirror else f"{first} {relation} {second}"


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points of the box [-1, 1]² (y downwards) lie in the shape, which touches all four sides of the box."""
    radius = np.hypot(x, y)
    if shape == "star":
        return _inside_star(x, y)
    tests: dict[str, Callable[[], np.ndarray]] = {
        "circle": lambda: radius <= 1,
        "square": lambda: np.ones_like(x, bool),
        "triangle": lambda: np.abs(x) <= (y + 1) / 2,
        "cross": lambda: (np.abs(x) < 0.34) | (np.abs(y) < 0.34),
        "ring": lambda: (radius <= 1) & (radius >= 0.55),
    }
    return tests[shape]()


def _inside_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angles = np.pi / 5 * np.arange(11)
    corner = np.where(np.arange(11) % 2 == 0, 1.0, 0.42)
    cx, cy = corner * np.sin(angles), -corner * np.cos(angles)
    # Stretched to fill the box: its lowest corners lie above y = 1 and its widest ones inside |x| = 1.
    cx, cy = cx / np.abs(cx).max(), 2 * (cy - cy.min()) / (cy.max() - cy.min()) - 1
    inside = np.zeros_like(x, bool)
    for x0, y0, x1, y1 in zip(cx[:-1], cy[:-1], cx[1:], cy[1:], strict=True):
        crosses = (y0 > y) != (y1 > y)
        # Not a division by zero where it counts: a horizontal edge crosses no horizontal ray.
        inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0 if y1 != y0 else 1.0))
    return inside


@cache
def _coverage(shape: str, size: int) -> np.ndarray:
    oversampling = 8
    points = (np.arange(size * oversampling) + 0.5) / (size * oversampling) * 2 - 1
    y, x = np.meshgrid(points, points, indexing="ij")
    return _inside(shape, x, y).reshape(size, oversampling, size, oversampling).mean((1, 3))


def _objects(metadata: Metadata, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Shape and colour of every object, those that belong to one entry of `include` in one colour."""
    objects = []
    for wanted in metadata.get("include", ()):
        shape, color = wanted["class"], wanted.get("color") or str(rng.choice(list(COLORS)))
        if shape not in SHAPES or color not in COLORS:
            raise UserError(
                f"the miniature world has no {color} {shape}: use {', '.join(SHAPES)} in {', '.join(COLORS)}"
            )
        objects += [(shape, color)] * wanted["count"]
    if not 1 <= len(objects) <= max(_SIZES):
        raise UserError(f"a picture holds 1 to {max(_SIZES)} objects, not {len(objects)}: change the prompt's counts")
    return objects


def _render_shapes(metadata: Metadata, rng: np.random.Generator) -> np.ndarray:
    objects = _objects(metadata, rng)
    relations = [(i, *o["position"]) for i, o in enumerate(metadata["include"]) if "position" in o]
    boxes = _place(len(objects), relations, rng)
    picture = np.full((SIZE, SIZE, 3), rng.integers(222, 247), float)
    for (shape, color), (left, top, size) in zip(objects, boxes, strict=True):
        alpha = _coverage(shape, size)[..., None]
        patch = picture[top : top + size, left : left + size]
        patch[:] = (1 - alpha) * patch + alpha * np.array(COLORS[color], float)
    return picture.round().astype(np.uint8)


def _place(n: int, relations: Sequence[tuple[int, str, int]], rng: np.random.Generator) -> np.ndarray:
    """(left, top, size) of `n` boxes that keep a gap and stand in the given relations, int (n, 3)."""
    size = np.full(n, _SIZES[n])
    cells = (SIZE - 2 * _MARGIN - _SIZES[n]) // _CELL + 1
    axes = [np.array(_axis(relation)) for _, relation, _ in relations]
    first, second = np.triu_indices(n, 1)
    # Rejection sampling, many candidates at a time: four objects fit by chance about once in a hundred.
    while True:
        corner = _MARGIN + _CELL * rng.integers(cells, size=(128, n, 2))
        distance = np.abs(corner[:, first] - corner[:, second]).max(-1)
        fits = (distance >= _SIZES[n] + _GAP).all(-1)
        for (i, _, j), axis in zip(relations, axes, strict=True):
            offset = corner[:, i] - corner[:, j]
            # Within 30° of the axis: well inside what the reward accepts.
            fits &= offset @ axis > 0.87 * np.hypot(*offset.T)
        if fits.any():
            chosen = fits.argmax()
            return np.column_stack([corner[chosen], size])


def _axis(relation: str) -> tuple[int, int]:
    if relation not in RELATIONS:
        raise UserError(f"there is no relation {relation!r}: use {', '.join(RELATIONS)}")
    return RELATIONS[relation]


@cache
def _glyph(letter: str, width: int = 8, height: int = 14) -> np.ndarray:
    """How dark each pixel of a letter is, float64 (height, width) in [0, 1]."""
    rows = bytes.fromhex(_FONT[letter])
    bits = np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows], np.uint8)
    enlarged = Image.fromarray((255 * bits).repeat(16, 0).repeat(16, 1))
    return np.asarray(enlarged.resize((width, height), Image.Resampling.BOX), float) / 255


def _render_sign(word: str, rng: np.random.Generator) -> np.ndarray:
    if len(word) != 3 or any(letter not in _FONT for letter in word):
        raise UserError(f"a sign holds three letters A-Z, not {word!r}: change the prompt")
    picture = np.full((SIZE, SIZE, 3), rng.integers(222, 247), float)
    left, top = rng.integers(2, 5), rng.integers(5, 8)
    picture[top + 18 :, 14:18] = (120, 80, 50)
    picture[top - 4 : top + 18] = (40, 60, 120)
    picture[top - 3 : top + 17, 1:-1] = 255
    for i, letter in enumerate(word):
        alpha = _glyph(letter)[..., None]
        height, width = alpha.shape[:2]
        patch = picture[top : top + height, left + 9 * i : left + 9 * i + width]
        patch[:] = (1 - alpha) * patch + alpha * 20
    return picture.round().astype(np.uint8)
