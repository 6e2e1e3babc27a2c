"""Statistics of pictures, by hand and on pictures of the small world, and the rules that look at them."""

from math import log

import numpy as np
import pytest

from dgpo_fast.config.watch_options import Watch
from dgpo_fast.evaluation.rules import alarms, last_good, passed, signs, unconfirmed
from dgpo_fast.records import Metrics
from dgpo_fast.rewards.shipped import pixels
from dgpo_fast.tiny import data

GROUP = 4


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Drawings of the small world, uint8 (32, 32, 32, 3): eight prompts, four pictures of each."""
    rng = np.random.default_rng(0)
    prompts = data.all_prompts()
    chosen = [prompt for prompt in prompts[:: len(prompts) // 8][:8] for _ in range(GROUP)]
    return np.stack([data.render(metadata, rng) for _, metadata in chosen])


def look(pictures: np.ndarray, base: np.ndarray, **more: object) -> Metrics:
    """The metrics of a look at `pictures`."""
    found, before = (pixels.statistics(images, GROUP) for images in (pictures, base))
    ratios = {f"look/{name}_ratio": value / before[name] for name, value in found.items() if before[name]}
    ratios["look/grid_ratio"] = pixels.grid_growth(pictures, base)
    shares = {"look/dark_share": found["dark_share"], "look/dark_share_base": before["dark_share"]}
    return {"iteration": 5, "look/reward_gain_mean": 0.1, **ratios, **shares, **more}


def test_statistics_by_hand() -> None:
    """Left half black, right half pure red."""
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[:, :, 8:, 0] = 255
    assert pixels.brightness(image) == pytest.approx(0.2126 / 2)
    assert pixels.dark_share(image) == 0.5
    assert pixels.saturation(image) == 0.5
    assert pixels.colour_entropy(image) == 1.0
    assert pixels.edge_density(image) == pytest.approx(1 / 15), "one of the 15 columns that have a right neighbour"
    assert pixels.diversity(np.concatenate([image, image[:, :, ::-1]]), 2) == pytest.approx(np.sqrt(1 / 3))


def test_the_base_against_itself_passes_no_rule(pictures: np.ndarray) -> None:
    found = look(pictures, pictures)
    assert {value for name, value in found.items() if name.endswith("_ratio")} == {1.0}
    assert passed(found, Watch()) == {}


def test_half_blacked_out(pictures: np.ndarray) -> None:
    black = pictures.copy()
    black[:, :16] = 0
    found = passed(look(black, pictures), Watch(diversity=0.2))
    assert {"brightness", "saturation", "dark_share", "diversity"} <= found.keys()


@pytest.mark.parametrize("period", [4, 8])
def test_a_faint_checkerboard_is_a_grid_and_nothing_else(period: int, pictures: np.ndarray) -> None:
    """2 % of the range, which no other statistic minds."""
    rows, columns = np.indices((32, 32)) * 2 // period % 2
    board = (0.02 * 255 * (2 * (rows ^ columns) - 1))[..., None]
    found = look(np.clip(np.rint(pictures + board), 0, 255).astype(np.uint8), pictures)
    assert passed(found, Watch()).keys() == {"grid"}, found


def test_copies_of_one_picture_have_no_diversity(pictures: np.ndarray) -> None:
    copies = pictures[::GROUP].repeat(GROUP, axis=0)
    assert pixels.diversity(copies, GROUP) == pytest.approx(0, abs=1e-3)
    assert "diversity" in passed(look(copies, pictures), Watch())


def test_a_grid_is_seen_in_pictures_of_any_shape() -> None:
    """Noise has none; lines every 16 pixels have one, also if a side is no multiple of 16."""
    noise = np.random.default_rng(0).integers(96, 160, (8, 100, 72, 3), dtype=np.uint8)
    lines = noise.copy()
    lines[:, ::16] += 16
    assert pixels.grid_growth(lines, noise) > 5 and pixels.grid_growth(noise, noise) == 1


def test_rules_that_are_off_say_nothing(pictures: np.ndarray) -> None:
    rules = ("norm_ratio", "edges", "colours", "brightness", "saturation", "dark", "diversity", "grid", "together")
    off = dict.fromkeys(rules)
    assert passed(look(np.zeros_like(pictures), pictures, norm_ratio=2.0), Watch(**off)) == {}


def test_an_alarm_needs_looks_in_a_row(pictures: np.ndarray) -> None:
    fine = look(pictures, pictures, norm_ratio=1.0)
    long = look(pictures, pictures, norm_ratio=1.1)
    looks = [{**one, "iteration": 5 * number} for number, one in enumerate([fine, long, fine, long, long, long], 1)]
    alone = Watch(in_a_row=2, together=None)
    assert [list(alarms(looks[:count], alone)) for count in range(1, 7)] == [[], [], [], [], *[["norm_ratio"]] * 2]
    asked = [unconfirmed(looks[:count], alone) for count in range(7)]
    assert asked == [False, False, True, False, True, False, False], "another look is to confirm the first"
    assert not any(unconfirmed(looks[:count], Watch()) for count in range(7))
    assert [last_good(looks[:count], Watch()) for count in range(7)] == [0, 5, 5, 15, 15, 15, 15]
    assert passed(long, alone) == {"norm_ratio": "norm ratio 1.10 (limit 1.05)"}


def test_signs_add_up(pictures: np.ndarray) -> None:
    """Each of three has six tenths of its threshold: two together have 0.85, three 1.04. A grid does not count."""
    same = look(pictures, pictures, **{"look/grid_ratio": 2.9})
    two = same | {"look/edge_density_ratio": 0.7**-0.6, "look/colour_entropy_ratio": 0.6**0.6}
    three = two | {"norm_ratio": 1.03}
    shares = {rule: sign.share for rule, sign in signs(three, Watch()).items() if sign.share}
    assert shares == pytest.approx({"edge_density": 0.6, "colour_entropy": 0.6, "norm_ratio": 0.6, "grid": log(2.9, 3)})
    for signs_of, settings in ((two, Watch()), (three, Watch(together=None)), (three, Watch(together=1.1))):
        assert passed(signs_of, settings) == {}
    (phrase,) = passed(three, Watch()).values()
    assert phrase.startswith("signs together 1.04 (limit 1), most of all ") and " and " in phrase
    assert passed(same | {"norm_ratio": 1.06}, Watch())["together"] == "signs together 1.20 (limit 1)"


def test_of_rewards_beside_the_trained_one_the_worst_is_added(pictures: np.ndarray) -> None:
    """Two that have fallen by one half width each are no alarm, beside other signs only one of them counts."""
    interval = {f"look/watch/{name}_gain_{of}" for name in "ab" for of in ("mean", "ci95")}
    fallen = look(pictures, pictures, **{name: -1.0 if name.endswith("mean") else [-2.0, 0.0] for name in interval})
    assert {rule: sign.share for rule, sign in signs(fallen, Watch()).items() if sign.share} == {
        "reward a": 0.5,
        "reward b": 0.5,
    }
    assert passed(fallen | {"norm_ratio": 1.043}, Watch()) == {}  # 0.86² + 0.5² < 1 < 0.86² + 0.5² + 0.5²


@pytest.mark.parametrize(
    ("gain", "high", "fires"), [(0.1, -0.11, True), (0.1, -0.09, False), (-0.1, -0.11, False), (0.1, None, False)]
)
def test_a_watch_reward_below_the_base_while_the_trained_one_rises(
    gain: float, high: float | None, fires: bool, pictures: np.ndarray
) -> None:
    """Below by more than two half widths of the interval."""
    more = {"look/watch/taste_gain_mean": -0.2, "look/watch/taste_gain_ci95": [-0.4, high]}
    found = passed(look(pictures, pictures, **more) | {"look/reward_gain_mean": gain}, Watch(together=None))
    assert found == ({"reward taste": "reward taste -0.20 below the base's"} if fires else {})
