"""GenEval's rules on plain detections: numbers worked by hand, and a second implementation written for this test."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgpo_fast.rewards.shipped.geneval_rules import Detection, keep, relations, score

TWO_CLOCKS = {"include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}]}
RED_CAR = {"include": [{"class": "car", "count": 1, "color": "red"}]}
DOG_RIGHT_OF_TIE = {
    "include": [{"class": "tie", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]
}
RED_CAR_BLUE_CUP = {
    "include": [{"class": "car", "count": 1, "color": "red"}, {"class": "cup", "count": 1, "color": "blue"}]
}


def seen(name: str, color: str = "", x: float = 50, confidence: float = 0.95) -> Detection:
    """A 20 × 20 object with its centre at (x, 50)."""
    return Detection(name, confidence, (x - 10, 40, x + 10, 60), None, color)


def clocks(count: int) -> list[Detection]:
    return [seen("clock") for _ in range(count)]


@pytest.mark.parametrize(
    ("found", "metadata", "fixed", "compat", "correct", "strict"),
    [
        # 1 − |found − 2| / 2; the third clock reaches `exclude`; only the release goes below 0.
        (clocks(0), TWO_CLOCKS, 0, 0, False, False),
        (clocks(1), TWO_CLOCKS, 1 / 2, 1 / 2, False, False),
        (clocks(2), TWO_CLOCKS, 1, 1, True, True),
        ([*clocks(2), seen("cat")], TWO_CLOCKS, 1, 1, True, True),
        (clocks(3), TWO_CLOCKS, 1 / 2, 1 / 2, False, False),
        (clocks(5), TWO_CLOCKS, 0, -1 / 2, False, False),
        # Count and colour.
        ([seen("car", "red")], RED_CAR, 1, 1, True, True),
        ([seen("car", "blue")], RED_CAR, 1 / 2, 1 / 2, False, False),
        ([], RED_CAR, 0, 0, False, False),
        # Officially the most confident car alone is looked at.
        ([seen("car", "red"), seen("car", "blue")], RED_CAR, 0, 0, True, False),
        ([seen("car", "blue"), seen("car", "red")], RED_CAR, 0, 0, False, False),
        # Four terms.
        ([seen("car", "red"), seen("cup", "blue")], RED_CAR_BLUE_CUP, 1, 1, True, True),
        ([seen("car", "blue"), seen("cup", "red")], RED_CAR_BLUE_CUP, 2 / 4, 2 / 4, False, False),
        ([seen("car", "red")], RED_CAR_BLUE_CUP, 2 / 4, 2 / 4, False, False),
        # Tie counted, dog counted, dog's position; where it fails, the release counts 0 and 1.
        ([seen("dog", x=80), seen("tie", x=20)], DOG_RIGHT_OF_TIE, 1, 1, True, True),
        ([seen("dog", x=20), seen("tie", x=80)], DOG_RIGHT_OF_TIE, 2 / 3, 3 / 4, False, False),
        ([seen("dog", x=80)], DOG_RIGHT_OF_TIE, 1 / 3, 1 / 3, False, False),
        ([seen("tie", x=20)], DOG_RIGHT_OF_TIE, 1 / 3, 1 / 3, False, False),
        # Two ties: the release gives no position; officially the most confident tie counts.
        ([seen("dog", x=80), seen("tie", x=20), seen("tie", x=5)], DOG_RIGHT_OF_TIE, 2 / 3, 1 / 3, True, False),
        ([seen("dog", x=80), seen("dog", x=90), seen("tie", x=20)], DOG_RIGHT_OF_TIE, 1 / 3, 1 / 3, True, False),
    ],
)
def test_scores_by_hand(found, metadata, fixed, compat, correct, strict):
    assert score(found, metadata, "fixed") == (pytest.approx(fixed), correct, strict)
    assert score(found, metadata, "compat") == (pytest.approx(compat), correct, strict)


def test_relations_by_hand():
    def place(x: float, y: float, width: float = 10, height: float = 10) -> Detection:
        return Detection("a", 1, (x - width / 2, y - height / 2, x + width / 2, y + height / 2))

    middle = place(100, 100)
    # Offset (−10, 0), shrunk by 0.1 · (10 + 10) = 2 to (−8, 0), over the length 10.
    assert relations(place(90, 100), middle) == {"left of"}
    # (4, 0) shrinks to (2, 0): 2 / 4 is not beyond 0.5; (4.1, 0): 2.1 / 4.1 is.
    assert relations(place(104, 100), middle) == set()
    assert relations(place(104.1, 100), middle) == {"right of"}
    # (8, 10) shrinks to (6, 8), over 12.8: (0.47, 0.62).
    assert relations(place(108, 110), middle) == {"below"}
    # (10, −10) shrinks to (8, −8), over 14.1: two relations.
    assert relations(place(110, 90), middle) == {"right of", "above"}
    # Sizes count each in its direction: (10, 10) with a width of 60 shrinks to (3, 8).
    assert relations(place(110, 110, width=60), middle) == {"below"}
    assert relations(middle, middle) == set()


def test_keep_by_hand():
    found = [seen("cat", confidence=c) for c in (0.2, 0.3, 0.31, 0.9, 0.91)] + [seen("dog", confidence=0.5)]
    assert [(d.name, d.confidence) for d in keep(found, "two_object")] == [
        ("cat", 0.91),
        ("cat", 0.9),
        ("dog", 0.5),
        ("cat", 0.31),
    ]
    assert [d.confidence for d in keep(found, "counting")] == [0.91]
    crowd = [seen(name, confidence=0.5 + i / 100) for i in range(20) for name in ("cat", "dog")]
    kept = keep(crowd, "")
    assert sorted(d.name for d in kept) == ["cat"] * 16 + ["dog"] * 16
    assert min(d.confidence for d in kept) == pytest.approx(0.54)


def test_a_detections_place():
    one = Detection("cat", 0.5, (10, 20, 40, 30))
    assert (one.centre, one.size) == ((25, 25), (30, 10))


def holds(a: Detection, b: Detection, relation: str) -> bool:
    """The position rule with one direction at a time."""
    (ax, ay), (bx, by) = a.centre, b.centre
    dx, dy = ax - bx, ay - by
    length = (dx * dx + dy * dy) ** 0.5
    if length == 0:
        return False
    slack_x, slack_y = 0.1 * (a.size[0] + b.size[0]), 0.1 * (a.size[1] + b.size[1])
    forward = {"left of": -dx - slack_x, "right of": dx - slack_x, "above": -dy - slack_y, "below": dy - slack_y}
    return forward[relation] / length > 0.5


def release(found: list[Detection], metadata: dict) -> tuple[float, bool]:
    """Graded score and strict verdict as the release words it: a list that grows entry by entry."""
    rewards, groups, strict = [], [], True
    for wanted in metadata["include"]:
        objects = [d for d in found if d.name == wanted["class"]]
        rewards.append(1 - abs(wanted["count"] - len(objects)) / wanted["count"])
        fine = len(objects) == wanted["count"]
        if not fine and {"color", "position"} & wanted.keys():
            rewards.append(0)
        if fine and "color" in wanted:
            right = [d for d in objects if d.color == wanted["color"]]
            rewards.append(1 - abs(wanted["count"] - len(right)) / wanted["count"])
            fine = len(right) == wanted["count"]
        if fine and "position" in wanted:
            relation, target = wanted["position"]
            if groups[target] is None:
                fine = False
                rewards.append(0)
            else:
                fine = all(holds(a, b, relation) for a, b in itertools.product(objects, groups[target]))
                rewards += [1] if fine else [0, 1]
        groups.append(objects if fine else None)
        strict = strict and fine
    return sum(rewards) / len(rewards), strict


def official(found: list[Detection], metadata: dict) -> bool:
    groups = []
    for wanted in metadata["include"]:
        objects = [d for d in found if d.name == wanted["class"]][: wanted["count"]]
        fine = len(objects) == wanted["count"]
        if "color" in wanted:
            fine = fine and sum(d.color == wanted["color"] for d in objects) == wanted["count"]
        if fine and "position" in wanted:
            relation, target = wanted["position"]
            fine = groups[target] is not None and all(holds(a, b, relation) for a in objects for b in groups[target])
        groups.append(objects if fine else None)
    reached = [sum(d.name == e["class"] for d in found) >= e["count"] for e in metadata.get("exclude", [])]
    return None not in groups and not any(reached)


detections = st.builds(
    seen, st.sampled_from(["cat", "dog"]), st.sampled_from(["red", "blue"]), st.sampled_from([10.0, 13.0, 50.0, 90.0])
)
cat = st.fixed_dictionaries(
    {"class": st.just("cat"), "count": st.integers(1, 3)}, optional={"color": st.sampled_from(["red", "blue"])}
)
dog = st.fixed_dictionaries(
    {"class": st.just("dog"), "count": st.integers(1, 3)},
    optional={
        "color": st.sampled_from(["red", "blue"]),
        "position": st.tuples(st.sampled_from(["left of", "right of", "above"]), st.just(0)),
    },
)


@settings(max_examples=300, deadline=None)
@given(st.lists(detections, max_size=6), cat, dog, st.integers(0, 4))
def test_scores_are_those_of_a_second_implementation(found, first, second, limit):
    metadata = {"include": [first, second]}
    # As in GenEval, what is excluded is more of a class that is asked for.
    if limit > first["count"]:
        metadata["exclude"] = [{"class": "cat", "count": limit}]
    graded, correct, strict = score(found, metadata, "compat")
    assert (pytest.approx(graded), strict) == release(found, metadata)
    assert correct == official(found, metadata)
    fixed = score(found, metadata, "fixed")
    assert 0 <= fixed.graded <= 1 and (fixed.correct, fixed.strict) == (correct, strict)
    # What is strictly correct gets full marks, and nothing else does.
    assert strict == (fixed.graded == 1) == (graded == 1)


def test_scores_do_not_depend_on_where_the_picture_is():
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.uniform(0, 100, (2, 2))
        boxes = np.concatenate([corners, corners + np.array([20, 30])], axis=1)
        a, b = (Detection("a", 1, tuple(box)) for box in boxes)
        moved = [Detection("a", 1, tuple(box + 37)) for box in boxes]
        doubled = [Detection("a", 1, tuple(2 * box)) for box in boxes]
        assert relations(a, b) == relations(*moved) == relations(*doubled)
