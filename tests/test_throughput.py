"""What `benchmarks/throughput.py` measures on a small card, and which rows its tables compare."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import float8, throughput
from benchmarks.throughput import CASES, EQUAL_GROUPS, Bench
from benchmarks.throughput_plot import plot, ratios
from benchmarks.throughput_tables import (
    cases_table,
    document,
    float8_table,
    gradients_table,
    of_its_machine,
    paired_table,
    savings_table,
    targets_table,
)
from dgpo_fast.config.command_line import configure
from dgpo_fast.engine import engine
from dgpo_fast.memory.predict import Predictor
from tests.sd3 import medium

H100, H200 = ({"kind": "cuda", "name": name, "matmul_tflops": 700.0, "datasheet_tflops": 989.0} for name in "ab")


def bench(gib: float, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Of a card with so much memory."""
    monkeypatch.setattr(throughput, "memory_gib", lambda device: gib)
    return Bench("cuda", groups=2, rounds=1, minutes=1, only=[], path=Path())


def test_what_fits_an_80_gb_card_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours alone in full fine-tuning, and two trainers with LoRA; both below 78 GiB by prediction."""
    small, predictor = bench(79.0, monkeypatch), Predictor(medium(), torch.bfloat16)
    lora, full = (next(case for case in CASES if case.train == train) for train in ("lora", "full"))
    assert small.alone(full) and not small.alone(lora)
    for case, beside in ((full, 0), (lora, 1)):
        config = configure(small.arguments(case))
        predicted = predictor.predict(config, config.policy.micro_batch_size)
        held = sum(predicted.held.values())
        assert not config.random_text_encoders
        assert predicted.peak + beside * held < 78 * 2**30


def test_encoding_is_timed_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    large = bench(139.0, monkeypatch)
    assert not large.alone(CASES[-1]) and not configure(large.arguments(CASES[0])).random_text_encoders
    assert configure(large.arguments(CASES[0], text_encoders=True)).random_text_encoders
    assert large.note(CASES[0]) == "" and large.note(CASES[-1]) == "an average in the CPU's memory; encoding left out"


def test_rows_of_other_cards_are_not_compared() -> None:
    """A row without a machine is of the one whose matmul rate is there."""

    def saving(machine: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        row = {
            "ratio": [1.0] * 3,
            "rounds": 3,
            "seconds": {of: {"iteration": [seconds] * 3} for of in ("ours", "changed")},
        }
        return row if machine is None else {**row, "machine": machine}

    case = {"machine": H100, "systems": {"ours": {"tflops": 350.0, "seconds": {"iteration": [1.0] * 3}}}}
    report = of_its_machine(
        {
            "machine": H200,
            "cases": {"LoRA, guided, G 16": case},
            "savings": {
                "engine.compile": saving(H100, 7.25),
                "engine.attention": saving(H200, 3.5),
                EQUAL_GROUPS: saving(None, 4.5),
            },
        }
    )
    table = savings_table(report)
    assert "3.5" in table and "4.5" in table and "7.25" not in table
    assert "| `engine.compile` off | not measured |" in table
    assert "1 (1, 1)" not in cases_table(report)
    assert "50 %" not in targets_table(report)


def test_whole_runs_are_shown_of_every_machine() -> None:
    """Their ratios stand for themselves."""

    def runs(machine: dict[str, Any], times: float) -> dict[str, Any]:
        runs = {name: [{"iteration_s": s, "iteration_cpu_s": s}] for name, s in (("off", 2 * times), ("on", 2.0))}
        found = {key: {"median": times, "interval": [times, times]} for key in ("iteration_s", "iteration_cpu_s")}
        return {"machine": machine, "pairs": 1, "runs": runs, "ratio": found}

    report = of_its_machine({"machine": H200, "paired": {"one": runs(H100, 1.5), "other": runs(H200, 1.25)}})
    rows = paired_table(report).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| one", "| one", "| other", "| other"]
    assert "1.50× (1.50 to 1.50)" in rows[0] and "| 2.50 | 2.00 | 1.25×" in rows[2]


@pytest.mark.parametrize("rounding", [0.0, 0.05])
def test_what_float8_changes(rounding: float, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts and noise: no difference where the copy computes the same, one where its weights are rounded."""

    class Copied:
        layers = ()

        def __init__(self, source: torch.nn.Module):
            self.source, self.transformer = source, copy.deepcopy(source)

        @torch.no_grad()
        def refresh(self) -> None:
            for ours, theirs in zip(self.transformer.parameters(), self.source.parameters(), strict=True):
                ours.copy_(theirs * (1 + rounding))

    monkeypatch.setattr(engine, "Float8Copy", Copied)
    row = float8.difference(["small.yaml", "--evaluation.images", "6"])
    pictures, reward = row["pictures"]["mean"], row["reward_difference"]["mean"]
    assert row["images"] == 6 and (pictures > 0) == (reward != 0) == (rounding > 0)
    assert row["pictures"]["ci95"][0] <= pictures <= row["pictures"]["ci95"][1]
    table = float8_table({"float8": {"tiny-shapes": row}})
    assert f"{pictures:.3g} (" in table and f"{reward:.3g} (" in table


def test_all_systems_stand_in_the_tables() -> None:
    """C′ with LoRA; fully fine-tuned it is C. A micro-batch that was halved is said, and both matmul rates of a GPU."""
    system = {"tflops": 1.0, "images_per_s": 1.0, "warmup_s": 1.0, "peak_memory_mib": 2048.0, "micro_batch": 32}
    system |= {"seconds": {phase: [1.0] * 3 for phase in ("iteration", "rollout", "train")}}
    systems = {name: dict(system) for name in ("A", "B", "C", "C′", "ours")}
    systems["A"]["micro_batch"] = 16
    full = {name: row for name, row in systems.items() if name != "C′"}
    same = {"same": True, "relative_error": dict.fromkeys(systems, 0.01), "budget": 0.02}
    report = {
        "machine": {
            **H200,
            "dtype": "bfloat16",
            "matmul_size": 8192,
            "matmul_burst_tflops": 790.0,
            "copy_gb_per_s": 4.3,
        },
        "cases": {
            "LoRA, guided, G 16": {"systems": systems, "same_gradient": same},
            "full, guided, G 16": {"systems": full, "same_gradient": same},
        },
    }
    rows = [row.split(" | ")[:2] for row in cases_table(report).splitlines() if "1.00×" in row]
    lora, trained = ([row[1] for row in rows if name in row[0]] for name in ("LoRA", "full"))
    assert lora[0] == "A, reference-style, micro-batches of 16"
    assert lora[1:] == ["B, eager", "C, compiled", "C′, compiled, merged copies", "ours"]
    assert trained[2:] == ["C and C′, compiled: nothing to merge", "ours"]
    gradients = gradients_table(report).splitlines()
    assert "C′" in gradients[0] and "| as C |" in next(row for row in gradients if "full" in row)
    assert "reached 700 TFLOP/s (in a burst 790)" in document(report)
    assert "| iteration vs C′, same gradient | 1× | 1.2× | 1× | the first |" in targets_table(report)


def test_the_plot_has_what_stands_beside_ours(tmp_path: Path) -> None:
    """Over ours, by case; a case without ours, or with an error, has no bars."""
    of = {name: {"seconds": {"iteration": [s, s, s]}} for name, s in (("B", 3.0), ("C′", 2.2), ("ours", 2.0))}
    cases = {"one": {"systems": of}, "two": {"error": "no memory"}, "three": {"systems": {"B": of["B"]}}}
    assert ratios(cases) == {"one": {"B": 1.5, "C′": 1.1}}
    plot(cases, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
