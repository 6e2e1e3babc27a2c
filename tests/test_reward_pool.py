"""Rewards beside the rollout: the same scores from worker processes, and what becomes of those that hang or die."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import GroupScores, RewardPool, WeightedReward, count_workers, load_rewards
from dgpo_fast.rewards.shipped.ocr import OcrReward
from tests.processes import heed_ctrl_c

CPU = torch.device("cpu")
SIZE = 3

MODULE = '''
"""A user's rewards, in a module of the working folder."""

import ctypes
import os
import re
import signal
import sys
import time

import numpy as np

from dgpo_fast.errors import UserError


class Trouble:
    """Scores by the mean; some prompts are too much for it."""

    runs_on_cpu = True

    def __call__(self, images, prompts, metadata):
        images = images.copy()
        match prompts[0]:
            case "hang":
                time.sleep(600)
            case "slow":
                time.sleep(1)
            case "hang in C":
                print(os.getpid(), flush=True)
                ctypes.PyDLL(None).sleep(600)  # keeps Python's lock
            case "exit":
                os._exit(3)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "raise":
                raise RuntimeError("no idea")
            case "nan":
                return images.mean((1, 2, 3)) * np.nan
            case "wrong set-up":
                raise UserError("reward 'trouble': wrong set-up")
        threads = int(os.environ["OMP_NUM_THREADS"]) if "OMP_NUM_THREADS" in os.environ else 0
        return images.mean((1, 2, 3)), {"threads": [threads] * len(images), "process": [os.getpid()] * len(images)}


class HangsHere:
    """Not for worker processes."""

    def __call__(self, images, prompts, metadata):
        time.sleep(600)


def sharpness(images, prompts, metadata):
    return np.abs(np.diff(images.astype(np.float32), axis=2)).mean((1, 2, 3)) + len(metadata[0])


sharpness.runs_on_cpu = True
'''


@pytest.fixture
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of rewards in the working folder, which the trainer has on its path as under `python -m`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    (tmp_path / "own_rewards.py").write_text(MODULE)
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


@pytest.fixture
def make_pool() -> Iterator[Callable[..., RewardPool]]:
    pools = []

    def make(reward: WeightedReward, workers: int, deadline_s: float = 60.0, notes: list[str] | None = None):
        note = print if notes is None else notes.append
        pools.append(RewardPool(reward, workers=workers, deadline_s=deadline_s, device=CPU, note=note))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def pictures(groups: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (groups * SIZE, side, side, 3), dtype=np.uint8)


def assert_same(ours: GroupScores, theirs: GroupScores) -> None:
    np.testing.assert_array_equal(ours.rewards, theirs.rewards)
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    assert ours.failures == theirs.failures
    assert list(ours.parts) == list(theirs.parts)
    for name, values in theirs.parts.items():
        np.testing.assert_array_equal(ours.parts[name], values)


def test_worker_processes_give_the_scores_of_one_process(own_rewards: str, make_pool: Callable) -> None:
    """Weighted sums and parts of five groups are equal to the last bit, whatever the size of the pictures."""
    reward = load_rewards(["jpeg=0.5", f"{own_rewards}:sharpness=-2"])
    pool = make_pool(reward, workers=2)
    for side in (16, 24, 8):
        prompts = [Prompt(f"prompt {index}", {"index": index}) for index in range(5)]
        images = pictures(5, side)
        assert_same(pool.score_groups(images, prompts, SIZE), reward.score_groups(images, prompts, SIZE))
    assert all(process.process is not None for process in pool.processes)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_images_may_come_in_any_portions(portions: list[int]) -> None:
    reward = load_rewards(["jpeg"])
    pool = RewardPool(reward, workers=0, deadline_s=60, device=CPU, note=print)
    groups = -(-sum(portions) // SIZE)
    portions = [*portions, groups * SIZE - sum(portions)]
    images, prompts = pictures(groups, 4), [Prompt(str(index)) for index in range(groups)]
    scoring, start = pool.start(prompts, SIZE), 0
    for count in portions:
        scoring.add(images[start : start + count])
        start += count
    assert_same(scoring.result(), reward.score_groups(images, prompts, SIZE))
    pool.close()


def test_wrong_numbers_of_images_are_refused() -> None:
    pool = RewardPool(load_rewards(["jpeg"]), workers=0, deadline_s=60, device=CPU, note=print)
    scoring = pool.start([Prompt("a"), Prompt("b")], SIZE)
    scoring.add(pictures(1))
    with pytest.raises(ValueError, match="images for 1 of 2 groups of 3"):
        scoring.result()
    with pytest.raises(ValueError, match="more images than 2 prompts of 3 images each"):
        scoring.add(pictures(2))
    with pytest.raises(ValueError, match="uint8"):
        scoring.add(pictures(1).astype(np.float32))
    pool.close()


def test_a_reward_that_hangs_or_dies_costs_its_group_only(own_rewards: str, make_pool: Callable) -> None:
    """Each is named with what became of it; the groups around it are scored, in order, by a new process."""
    texts = ["a", "hang", "b", "exit", "c", "crash", "raise", "nan", "d"]
    prompts, images = [Prompt(text) for text in texts], pictures(len(texts))
    name = f"{own_rewards}:Trouble"
    scores = make_pool(load_rewards([name]), workers=1, deadline_s=1.0).score_groups(images, prompts, SIZE)
    assert [text for text, valid in zip(texts, scores.valid, strict=True) if valid] == ["a", "b", "c", "d"]
    reasons = [
        "'hang': no answer within 1 s, so its process was stopped",
        "'exit': its process ended with exit status 3",
        "'crash': its process was ended by a signal (Segmentation fault)",
        "'raise': RuntimeError: no idea (PLACE)",
        "'nan': returned NaN for picture 1 of 3: return a finite number, or raise where there is none",
    ]
    failures = [re.sub(r"\([^()]*own_rewards\.py, line \d+\)", "(PLACE)", line) for line in scores.failures]
    assert failures == [f"reward {name!r}, prompt {reason}" for reason in reasons]
    means = images.reshape(len(texts), SIZE, -1).mean(2)
    np.testing.assert_allclose(scores.rewards[scores.valid], means[scores.valid], rtol=1e-6)
    by = scores.parts[f"{name}/process"][scores.valid, 0]
    assert len(set(by)) == 4, "each of the three that were lost was followed by a new process"
    assert (scores.parts[f"{name}/threads"][scores.valid] == 1).all()


def test_a_wrong_set_up_ends_the_run_from_a_worker_too(own_rewards: str, make_pool: Callable) -> None:
    pool = make_pool(load_rewards([f"{own_rewards}:Trouble"]), workers=1)
    with pytest.raises(UserError, match=r"^reward 'trouble': wrong set-up$"):
        pool.score_groups(pictures(2), [Prompt("wrong set-up"), Prompt("a")], SIZE)


def test_what_a_worker_cannot_import_is_scored_here_with_one_note(
    make_pool: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("made_up_module")
    module.mean = lambda images, prompts, metadata: images.mean((1, 2, 3))  # type: ignore[attr-defined]
    module.mean.runs_on_cpu = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_module", module)
    reward, notes = load_rewards(["made_up_module:mean"]), list[str]()
    prompts, images = [Prompt(str(index)) for index in range(6)], pictures(6)
    scores = make_pool(reward, workers=2, notes=notes).score_groups(images, prompts, SIZE)
    assert_same(scores, reward.score_groups(images, prompts, SIZE))
    assert len(notes) == 1 and "is scored in the trainer's own process: in a worker, " in notes[0]
    assert "no module 'made_up_module'" in notes[0]


def test_a_reward_that_hangs_in_this_process_ends_the_run_in_one_line(own_rewards: str, make_pool: Callable) -> None:
    pool = make_pool(load_rewards([f"{own_rewards}:HangsHere"]), workers=2, deadline_s=0.2)
    with pytest.raises(UserError, match=r"has not scored the pictures of 'a' within 0.2 s .* --resume$"):
        pool.score_groups(pictures(1), [Prompt("a")], SIZE)


def test_rewards_on_other_machines_are_asked_for_several_groups_at_a_time() -> None:
    """Two groups that each wait until the other one is being scored too are both scored."""
    together = threading.Barrier(2)

    class Remote:
        groups_at_once = 2

        def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
            together.wait(timeout=60)
            return images.mean((1, 2, 3))

    pool = RewardPool(
        WeightedReward({"remote": Remote()}, {"remote": 1.0}), workers=0, deadline_s=60, device=CPU, note=print
    )
    images = pictures(4)
    scores = pool.score_groups(images, [Prompt(str(index)) for index in range(4)], SIZE)
    np.testing.assert_allclose(scores.rewards, images.reshape(4, SIZE, -1).mean(2), rtol=1e-6)
    pool.close()


def test_a_reward_that_hangs_in_a_thread_costs_its_group_only() -> None:
    """Three groups hang on two threads: they are dropped at the deadline, and those behind them are scored.

    Threads that come back are not listened to, and leave the work to those that took their place.
    """
    goes_on = threading.Event()

    class Hangs:
        groups_at_once = 2

        def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
            if prompts[0] == "hang":
                goes_on.wait(timeout=30)
            return images.mean((1, 2, 3))

    pool = RewardPool(
        WeightedReward({"remote": Hangs()}, {"remote": 1.0}), workers=0, deadline_s=1.0, device=CPU, note=print
    )
    texts = ["hang", "hang", "hang", "a", "b", "c"]
    images = pictures(len(texts))
    means = images.reshape(len(texts), SIZE, -1).mean(2)
    scores = pool.score_groups(images, [Prompt(text) for text in texts], SIZE)
    assert scores.valid.tolist() == [False] * 3 + [True] * 3
    line = "reward 'remote', prompt 'hang': no answer within 1 s, so the run no longer waits for it"
    assert scores.failures == [line] * 3
    np.testing.assert_allclose(scores.rewards[3:], means[3:], rtol=1e-6)
    goes_on.set()
    threads = list(pool.threads)
    ends = time.monotonic() + 30
    while sum(thread.is_alive() for thread in threads) > 1 + 2:
        assert time.monotonic() < ends, "a thread that was given up is still there"
        time.sleep(0.01)
    again = pool.score_groups(images, [Prompt(text) for text in texts], SIZE)
    np.testing.assert_allclose(again.rewards, means, rtol=1e-6)
    pool.close()
    assert not any(thread.is_alive() for thread in threads)


def test_processes_share_a_group_of_independent_images(own_rewards: str, make_pool: Callable) -> None:
    """Portions of ten images by three processes; one that fails costs the group."""
    reward = load_rewards(["jpeg", f"{own_rewards}:Trouble"])
    reward.rewards[f"{own_rewards}:Trouble"].independent_images = True  # type: ignore[attr-defined]
    pool = make_pool(reward, workers=3, deadline_s=60)
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    scores = pool.score_groups(images, [Prompt("a"), Prompt("raise")], 10)
    expected = load_rewards(["jpeg"]).score_groups(images, [Prompt("a"), Prompt("raise")], 10)
    np.testing.assert_array_equal(scores.parts["jpeg"], expected.rewards)
    np.testing.assert_array_equal(scores.parts["jpeg/kilobytes"], expected.parts["jpeg/kilobytes"])
    assert scores.valid.tolist() == [True, False] and len(scores.failures) == 1
    assert [pool.portions("jpeg", count) for count in (1, 7, 8, 12, 16, 99)] == [1, 1, 2, 3, 3, 3]


def test_prompts_are_scored_by_the_rewards_that_they_name(own_rewards: str, make_pool: Callable) -> None:
    reward = load_rewards(["jpeg", f"sharp={own_rewards}:sharpness"])
    prompts = [Prompt("a", {"reward": "sharp"}), Prompt("b"), Prompt("c", {"reward": ["jpeg"]})]
    images = pictures(3)
    scores = make_pool(reward, workers=1).score_groups(images, prompts, SIZE)
    assert_same(scores, reward.score_groups(images, prompts, SIZE))
    assert np.isnan(scores.parts["jpeg"][0]).all() and np.isnan(scores.parts["sharp"][2]).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_reward_on_the_gpu_is_scored_beside_the_trainers_work() -> None:
    """On a stream of its own: the trainer's stream is done while the reward still computes, and scores are the same."""
    device = torch.device("cuda")
    weight = torch.randn(3, 3, device=device)

    class Network:
        def __call__(self, images: np.ndarray, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
            assert torch.cuda.current_stream() != torch.cuda.default_stream()
            torch.cuda._sleep(2_000_000_000)
            return (torch.from_numpy(images).to(device).float() @ weight).mean((1, 2, 3))

    reward = WeightedReward({"network": Network()}, {"network": 1.0})
    pool = RewardPool(reward, workers=0, deadline_s=60, device=device, note=print)
    images = pictures(2)
    scoring = pool.start([Prompt("a"), Prompt("b")], SIZE)
    scoring.add(images)
    torch.ones(8, device=device).sum()
    torch.cuda.current_stream().synchronize()
    assert not scoring.groups[1]["network"][0].result.done()
    expected = (torch.from_numpy(images).to(device).float() @ weight).mean((1, 2, 3)).cpu().numpy().reshape(2, SIZE)
    np.testing.assert_allclose(scoring.result().rewards, expected, rtol=1e-5)
    assert scoring.busy_s > 0
    pool.close()


def test_what_was_hidden_is_told(own_rewards: str, make_pool: Callable) -> None:
    """A group that was scored while the trainer did other work took time, and cost it none."""
    pool = make_pool(load_rewards([f"{own_rewards}:Trouble"]), workers=1)
    scoring = pool.start([Prompt("slow")], SIZE)
    scoring.add(pictures(1))
    (task,) = next(iter(scoring.groups[0].values()))
    while not task.result.done():
        time.sleep(0.01)
    assert scoring.result().valid.all()
    assert scoring.busy_s > 4 * scoring.wait_s > 0


START = """
import sys
sys.path.insert(0, "")
import numpy as np, torch
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import RewardPool, load_rewards
reward, device = load_rewards(["own_rewards:Trouble"]), torch.device("cpu")
pool = RewardPool(reward, workers=1, deadline_s=600, device=device, note=print)
try:
    pool.score_groups(np.zeros((1, 8, 8, 3), np.uint8), [Prompt("hang in C")], 1)
except KeyboardInterrupt:
    raise SystemExit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_no_worker_outlives_the_trainer(number: signal.Signals, own_rewards: str) -> None:
    """Not even one that is stuck in a call that holds Python's lock; and Ctrl-C, which reaches all, is quiet."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", START],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    assert trainer.stdout is not None and trainer.stderr is not None
    worker = int(trainer.stdout.readline())
    assert is_running(worker)
    os.killpg(trainer.pid, number)
    assert trainer.wait(60) == (130 if number == signal.SIGINT else -number)
    deadline = time.monotonic() + 30
    while is_running(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.02)
    assert "Traceback" not in trainer.stderr.read()
    trainer.stdout.close()
    trainer.stderr.close()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_auto_leaves_a_core_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 0), (2, 1), (6, 5), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert count_workers("auto", torch.device("cuda")) == expected
        assert count_workers("auto", CPU) == 0
        assert count_workers(3, CPU) == 3


def test_the_ocr_engine_of_a_worker_reads_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in (("1", 1), ("3", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
        assert OcrReward()._pool._max_workers == expected
