"""`python -m dgpo_fast.profile` on an untrained pipeline of the full architecture, from command line to files."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dgpo_fast.errors import UserError
from dgpo_fast.profiling.command import profile
from dgpo_fast.profiling.compare import compare, differences
from dgpo_fast.profiling.report import read_report
from dgpo_fast.trainer import Trainer
from tests.distributed_runs import SHARDED
from tests.processes import run_together
from tests.profiling.reports import HOSTILE, gpu_report


def test_what_a_profile_writes(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Page, numbers and trace; the numbers add up, and nothing of a run is left behind."""
    settings = yaml.safe_load((workspace / "small.yaml").read_text())
    prompts = workspace / "prompts <b>.txt"
    prompts.write_text((workspace / "prompts.txt").read_text() + HOSTILE + "\n")
    (workspace / "small.yaml").write_text(yaml.safe_dump(settings | {"prompts": str(prompts)}))
    assert profile(["small.yaml", "--measured", "2", "--name", "first", "--reward-workers", "0"]) == 0
    folder = workspace / "runs/first"
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json", "trace.json.gz"}
    report = read_report(folder)
    assert [iteration.images for iteration in report.iterations] == [12, 12]
    names = [phase.name for phase in report.phases]
    assert {"encode", "rollout", "decode", "reward", "train", "optimizer"} <= set(names) and names[-1] == "other"
    for iteration in report.iterations:
        outer = sum(span.end_s - span.start_s for span in iteration.spans if span.inside is None)
        assert 0.5 * iteration.seconds < outer <= 1.001 * iteration.seconds
        forwards = [span for span in iteration.spans if span.inside == "train"]
        assert {span.name for span in forwards} == {"reference forward", "old forward", "policy forward"}
    kinds = {work.name: work for work in report.work}
    assert (kinds["rollout"].samples, kinds["decode"].samples, kinds["backward"].samples) == (96, 12, 24)
    assert report.throughput.tflop_per_iteration == pytest.approx(sum(work.tflop for work in report.work))
    assert sum(row.tflop for row in report.operations) == pytest.approx(report.throughput.tflop_per_iteration)
    assert {row.kind for row in report.operations} == {"matmul", "attention", "convolution", "other"}
    assert len(report.hottest) == 20 and report.hottest[0].total_ms >= report.hottest[-1].total_ms > 0
    assert report.memory.peak_mib > sum(report.memory.held_mib.values()) > 0
    assert report.memory.predicted_mib is not None and 0 < report.memory.predicted_mib < report.memory.peak_mib
    timed = {"attention of rollouts", "attention of training", "decoding 6 images"}
    assert set(report.candidates) == timed
    assert all(sum(candidate.chosen for candidate in table) == 1 for table in report.candidates.values())
    decoders = {candidate.name: candidate for candidate in report.candidates["decoding 6 images"]}
    assert set(decoders) == {"plain", "fast", "phases"} and decoders["fast"].chosen
    assert all(candidate.forward_ms > 0 for candidate in decoders.values())  # type: ignore[operator]
    assert report.gpu is None and report.power is None
    assert report.settings["prompts"] == str(prompts) and report.device.kind == "cpu"
    page = (folder / "report.html").read_text()
    assert "prompts &lt;b&gt;.txt" in page and "prompts <b>" not in page
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    assert any(event["name"] == "phase: train" for event in events)
    output = capsys.readouterr().out
    assert f"{report.throughput.images} images takes" in output and "runs/first/report.html" in output
    with pytest.raises(UserError, match="runs/first exists: choose another --name"):
        profile(["small.yaml", "--name", "first"])


@pytest.mark.parametrize("weights", ["whole", "sharded"])
def test_a_profile_of_two_processes(weights: str, workspace: Path) -> None:
    """Process 0 writes it, with the seconds of both; three groups on two processes are uneven."""
    command = ["-m", "dgpo_fast.profile", "small.yaml", "--measured", "2", "--name", "two", "--reward-workers", "0"]
    run_together(command if weights == "whole" else [*command, *SHARDED], 2)
    folder = workspace / "runs/two"
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.json", "trace.json.gz"}
    report = read_report(folder)
    assert report.processes is not None and report.processes.imbalance > 1
    assert [process.number for process in report.processes.rows] == [0, 1]
    assert all(process.phases["train"] > 0 for process in report.processes.rows)
    assert sum(process.waited_s for process in report.processes.rows) > 0
    assert report.throughput.images == 12, "of both"
    assert next(work for work in report.work if work.name == "decode").samples == 8, "of process 0"
    assert any("2 processes" in note for note in report.notes)
    assert 'id="processes"' in (folder / "report.html").read_text()


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders or files; the ratio of each row, and what is better by its own measure."""
    from dgpo_fast.profiling.report import write_report

    monkeypatch.chdir(tmp_path)
    first, second = gpu_report(), gpu_report()
    second.throughput.images_per_s *= 2
    second.phases[1].times.median_s *= 1.5
    second.power = None
    second.settings["rollout.batch_size"] = 64
    for name, report in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        write_report(report, tmp_path / name)
    rows = {(row.group, row.name): row for row in compare(first, second)}
    assert (rows["speed", "images/s"].ratio, rows["speed", "images/s"].verdict) == (2, "better")
    rollout = rows["seconds per phase", "rollout"]
    assert (rollout.ratio, rollout.verdict) == (pytest.approx(1.5), "worse")
    assert rows["power", "energy an image"].ratio is None and rows["power", "energy an image"].second is None
    assert rows["memory", "peak"].verdict == ""
    assert differences(first, second) == [("rollout.batch_size", "32", "64")]
    assert profile(["--compare", "a", "b/report.json", "--output", "both.html"]) == 0
    output = capsys.readouterr().out
    assert "2.00×" in output and "both.html" in output
    assert "rollout.batch_size" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compare", "a"], "--compare takes two profiles"),
        (["--compare", "a", "b"], "a: cannot be read: No such file"),
        (["--measured", "0"], "--measured: a whole number from 1 up, not '0'"),
        (["--warmup", "some"], "--warmup: a whole number from 1 up, not 'some'"),
        (["tiny-shaes"], "unknown recipe 'tiny-shaes': did you mean 'tiny-shapes'"),
        (["--iteration", "3"], "did you mean 'iterations'"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        profile(args)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_module_does_not_stand_in_for_the_standard_librarys() -> None:
    """`cProfile` imports a module called `profile`; in a fresh process it gets its own, beside ours."""
    code = "import cProfile, profile, dgpo_fast.profile; assert 'dgpo_fast' not in profile.__file__, profile.__file__"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_profile_that_fails_leaves_no_folder(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Trainer) -> None:
        raise UserError("out of luck")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(UserError, match="out of luck"):
        profile(["small.yaml", "--name", "failed"])
    assert not (workspace / "runs/failed").exists()
