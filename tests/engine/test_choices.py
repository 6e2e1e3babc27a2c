"""What "auto" becomes, and what is refused in one line."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dgpo_fast.config.options import Engine
from dgpo_fast.config.recipes import RECIPES, get_recipe
from dgpo_fast.engine import attention, compile, engine, linear
from dgpo_fast.engine.attention import Timing, fastest, time_attention
from dgpo_fast.engine.choices import Choices, Workload, choose
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import AttentionShape
from tests.engine.cases import EngineCase, make_config
from tests.sd3 import family_in

CPU = torch.device("cpu")
SHAPES = (AttentionShape(batch=2, tokens=7, heads=2, head_dim=8, calls=3),)
HERE = Workload(CPU, torch.float32, SHAPES, SHAPES, width=32, images=3_999)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was measured here before, and what is made up here nobody else finds."""
    monkeypatch.setenv("DGPO_FAST_CACHE", str(tmp_path))


def test_auto_on_a_cpu_says_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = (Timing("native", 2.0, 5.0), Timing("matmul", 1.0, 4.9))
    monkeypatch.setattr(attention, "time_attention", lambda *_: timings)
    monkeypatch.setattr(linear, "time_linear", lambda *_: (3.0, 1.0))
    choices, reasons = choose(Engine(), HERE)
    assert choices == Choices(
        compile=False,
        cuda_graphs=False,
        attention="matmul",
        train_attention="native",
        linear="onednn",
        epilogue=False,
        decoder="fast",
        share_first_level=False,
    )
    assert reasons.lines == [
        "blocks are not compiled: on a CPU it only saves time in runs of 33,000 images or more",
        "attention of rollouts by matmul (native 2 ms, matmul 1 ms)",
        "attention of training by native (native 5 ms, matmul 4.9 ms)",
        "linear layers by onednn (torch 3 ms, onednn 1 ms)",
        "GELU of forwards without a gradient after the product: it saves time only on a GPU",
    ]


def test_a_cpu_compiles_in_runs_that_win_back_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "BACKEND", "eager")
    config = Engine(attention="native", linear="torch", epilogue="off")
    for images, saved in ((33_000, "0%"), (110_000, "12%")):
        choices, reasons = choose(config, replace(HERE, images=images))
        assert choices.compile and reasons.lines == [f"blocks are compiled: it should save {saved} of the time"]
    assert not choose(config, HERE)[0].compile


def test_without_a_compiler_that_works_a_run_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """None installed, or one that finds no headers."""
    long_run = replace(HERE, images=50_000)
    config = Engine(attention="native", linear="torch", epilogue="off")

    def no_headers(*_: Any) -> Any:
        raise RuntimeError("fatal error: omp.h: No such file\ncompilation terminated")

    monkeypatch.setattr(compile, "BACKEND", no_headers)
    torch._dynamo.reset()
    found = [choose(config, long_run)]
    monkeypatch.setattr("shutil.which", lambda name: None)
    found.append(choose(config, long_run))
    assert not any(choices.compile for choices, _ in found)
    failing, absent = (reasons.lines for _, reasons in found)
    assert len(failing) == 1 and failing[0].startswith("blocks are not compiled: the compiler fails: ")
    assert "omp.h: No such file" in failing[0] and "\n" not in failing[0]
    assert absent == ["blocks are not compiled: no C++ compiler (g++) is installed"]


def test_the_shipped_pipelines_recipes_do_not_compile() -> None:
    """Their results are those of eager blocks on every machine, however long the run."""
    assert {name for name in RECIPES if get_recipe(name).engine.compile != "off"} == {
        name for name in RECIPES if get_recipe(name).model != "tiny"
    }


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"cuda_graphs": "on"}, "engine.cuda_graphs on: needs a CUDA GPU; use --engine.cuda-graphs auto"),
        ({"attention": "native_cudnn"}, "engine.attention native_cudnn: needs a CUDA GPU; use --engine.attention auto"),
        ({"attention": "flash3"}, "engine.attention flash3: needs a CUDA GPU; use --engine.attention auto"),
    ],
)
def test_a_setting_that_cannot_be_had_is_refused(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}$"):
        choose(Engine(**settings), HERE)


@pytest.mark.parametrize(
    ("share", "sigma", "dtype", "line"),
    [
        ("auto", 1.0, torch.float32, "one row a group at the first noise level: exact, since σ is 1 there"),
        ("auto", 0.99967, torch.bfloat16, "one row a group at the first noise level: 1 − σ is 3.3e-04 there, less than "
         "bfloat16 rounds by (2.0e-03)"),
        ("auto", 0.99967, torch.float32, "one row a sample at the first noise level: 1 − σ is 3.3e-04 there, more than "
         "float32 rounds by; --engine.share-first-level on trains with that error"),
        ("on", 0.99967, torch.float32, "one row a group at the first noise level, INEXACT: 1 − σ is 3.3e-04 there, and "
         "its gradient is off by about as much"),
        ("off", 1.0, torch.float32, None),
        ("auto", None, torch.bfloat16, None),
    ],
)  # fmt: skip
def test_the_first_noise_level_is_labelled_by_its_error(
    share: str, sigma: float | None, dtype: torch.dtype, line: str | None
) -> None:
    config = Engine(share_first_level=share, compile="off", attention="native", linear="torch", epilogue="off")  # type: ignore[arg-type]
    choices, reasons = choose(config, replace(HERE, dtype=dtype, shared_sigma=sigma))
    assert reasons.lines == ([] if line is None else [line])
    assert choices.share_first_level == (line is not None and "row a group" in line)


def test_no_level_to_share_is_refused() -> None:
    """Of Diffusion-DPO and Flow-GRPO."""
    line = "engine.share_first_level on: with this objective, the samples of a group differ at every noise level; use "
    with pytest.raises(UserError, match=f"^{line}--engine.share-first-level auto$"):
        choose(Engine(share_first_level="on", attention="native"), HERE)


def test_onednn_is_for_fp32_runs() -> None:
    with pytest.raises(UserError, match=r"^engine.linear onednn: is for fp32 runs on a CPU; use --engine.linear auto$"):
        choose(Engine(linear="onednn", attention="native"), replace(HERE, dtype=torch.bfloat16))


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        UserError, match=r"^engine.compile on: no C\+\+ compiler \(g\+\+\) is installed; use --engine.compile off$"
    ):
        choose(Engine(compile="on", attention="native"), HERE)


def test_only_fp32_on_a_cpu_decodes_without_phases() -> None:
    """There, pictures and rewards are the same to the last bit whatever the version."""
    config = Engine(attention="native", compile="off", linear="torch")
    ways = [choose(config, replace(HERE, dtype=dtype))[0].decoder for dtype in (torch.float32, torch.bfloat16)]
    assert ways == ["fast", "phases"]
    assert choose(replace(config, decoder="plain"), HERE)[0].decoder == "plain"


def test_torchs_own_attention_stays_unless_another_is_clearly_faster() -> None:
    timings = (Timing("native", 10.0, 30.0), Timing("flash3", 9.5, 20.0), Timing("xformers", None, None, "absent"))
    assert fastest(timings, training=False) == "native"
    assert fastest(timings, training=True) == "flash3"


def test_kernels_that_compute_something_else_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend

    def attend(backend: Any, *inputs: torch.Tensor) -> torch.Tensor:
        wrong = backend is None and inputs[0].dtype == torch.float32
        return right(backend, *inputs) * (1.01 if wrong else 1.0)

    monkeypatch.setattr(attention, "attend", attend)
    timings = {timing.name: timing for timing in time_attention(SHAPES, CPU, torch.float32)}
    assert timings["matmul"].obstacle.startswith("computes different values") and timings["matmul"].forward_ms is None
    assert timings["native"].forward_ms > 0 and timings["native"].backward_ms > 0  # type: ignore[operator]


def test_kernels_with_other_gradients_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend

    def attend(backend: Any, *inputs: torch.Tensor) -> torch.Tensor:
        attended = right(backend, *inputs)
        wrong = backend is None and inputs[0].dtype == torch.float32
        return attended + (1.01 * attended - 1.01 * attended.detach()) if wrong else attended

    monkeypatch.setattr(attention, "attend", attend)
    timings = {timing.name: timing for timing in time_attention(SHAPES, CPU, torch.float32)}
    assert timings["matmul"].obstacle.startswith("computes different values") and not timings["native"].obstacle


def test_a_gpu_times_kernels_in_the_compiled_operations_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, concatenation, attention and slices: one graph each for forward and backward, of each kernel and shape."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(attention, "BACKEND", counter)
    shapes = (replace(SHAPES[0], text=3), replace(SHAPES[0], tokens=4))
    time_attention(shapes, CPU, torch.float32, compiled=True)
    assert counter.frame_count == 0, "a CPU times the kernels alone"
    monkeypatch.setattr(attention, "TIMED_IN_BLOCKS", ("cpu",))
    timings = time_attention(shapes, CPU, torch.float32, compiled=True)
    assert all(timing.forward_ms and timing.backward_ms and not timing.obstacle for timing in timings)
    assert counter.frame_count == 2 * 2 * 2
    query, key, value = torch.randn(3, 2, 7, 2, 8).unbind()
    normed = [torch.nn.functional.rms_norm(tensor, (8,)) for tensor in (query, key)]
    images, text = attention._block(None, 4, query, key, value)
    torch.testing.assert_close(torch.cat([images, text], 1), attention.attend(None, *normed, value))
    assert images.shape[1] == 4


def test_cudnns_attention_is_refused_where_it_reads_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for version in (91500, 91501):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        for tokens in (1024, 1229):
            shapes = (replace(SHAPES[0], tokens=128), replace(SHAPES[0], tokens=tokens))
            why = attention.obstacle("native_cudnn", torch.device("cuda"), torch.bfloat16, shapes)
            found[version, tokens] = "out of bounds" in why
    assert found == {(91500, 1024): False, (91500, 1229): True, (91501, 1024): False, (91501, 1229): False}


def test_kernels_that_no_graph_holds_are_left_out_where_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that Dynamo cannot trace: fast enough, and an obstacle in the table, or refused where it is named."""
    right = attention.attend
    opaque = torch._dynamo.disable(right)

    def attend(backend: Any, *inputs: torch.Tensor) -> torch.Tensor:
        return right(backend, *inputs) if backend is not None else opaque(backend, *inputs)

    monkeypatch.setattr(attention, "attend", attend)
    eager, compiled = (
        {timing.name: timing for timing in time_attention(SHAPES, CPU, torch.float32, whether)}
        for whether in (False, True)
    )
    assert eager["matmul"].forward_ms and not eager["matmul"].obstacle
    assert compiled["matmul"].obstacle.startswith("cannot be compiled: ") and compiled["matmul"].forward_ms is None
    assert compiled["native"].forward_ms and not compiled["native"].obstacle
    with pytest.raises(UserError, match=r"^engine.attention matmul: cannot be compiled: .*; use --engine.attention a"):
        choose(Engine(attention="matmul", compile="on"), HERE)
    assert choose(Engine(attention="matmul", linear="torch", compile="off"), HERE)[0].attention == "matmul"


def test_kernels_that_fail_at_work_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward pass, which the check against float64 has not; and torch's own too, by lack of memory."""

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise AssertionError("no plan for this shape")

    right = attention.attend

    def attend(backend: Any, *inputs: torch.Tensor) -> torch.Tensor:
        if backend is not None and len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return Refuses.apply(right(backend, *inputs)) if len(inputs[0]) > 1 else right(backend, *inputs)

    monkeypatch.setattr(attention, "attend", attend)
    timings = {timing.name: timing for timing in time_attention(SHAPES, CPU, torch.float32)}
    assert timings["matmul"].obstacle == "no plan for this shape" and timings["matmul"].backward_ms is None
    assert timings["native"].obstacle == "out of memory"
    assert fastest(tuple(timings.values()), training=True) == "native"


def test_the_fastest_kernel_must_compile_as_blocks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced it was before; what the compiler makes of it is tried for the one that is taken."""
    timings = (Timing("native", 2.0, 5.0), Timing("matmul", 1.0, 3.0))
    monkeypatch.setattr(attention, "time_attention", lambda *_: timings)
    monkeypatch.setattr(attention, "BACKEND", attention.TRACER)  # a compiler that takes all that can be traced
    config = Engine(compile="on", linear="torch")
    assert choose(config, HERE)[0].train_attention == "matmul"

    def refuse(*_: Any) -> Any:
        raise AssertionError("strides differ")

    monkeypatch.setattr(attention, "BACKEND", refuse)
    choices, reasons = choose(config, HERE)
    assert choices.attention == choices.train_attention == "native"
    assert reasons.lines[0].startswith("attention of rollouts not by matmul, the fastest: cannot be compiled: ")


def test_attention_shapes(random_pipeline: Path) -> None:
    joint, dual = family_in(random_pipeline).attention_shapes(batch=6, latent=(16, 8, 8), text_tokens=21)
    assert (joint.tokens, joint.calls, joint.heads, joint.head_dim) == (37, 2, 2, 16)
    assert (dual.tokens, dual.calls, dual.batch) == (16, 1, 6)


def test_the_float8_copy_attends_as_the_others_do(random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is adopted from process 0 or from the run's beginning reaches it too. Here the copy is not in float8."""

    class Copied:
        layers = ()

        def __init__(self, source: torch.nn.Module):
            self.transformer = copy.deepcopy(source)

        def refresh(self) -> None:
            pass

    monkeypatch.setattr(engine, "Float8Copy", Copied)
    case = EngineCase(random_pipeline, make_config(attention="auto", rollout_precision="fp8"))
    for name in ("matmul", "native"):
        case.engine.adopt({"device": "cpu", "attention": name, "train_attention": "native", "linear": "torch"})
        drawing = case.engine.rollout_transformer.transformer_blocks[0].attn.processor
        assert case.engine.rollout_transformer is not case.models.behaviour
        assert drawing._attention_backend is attention.DISPATCHED.get(name)


def test_a_resumed_run_adopts_what_was_measured(random_pipeline: Path) -> None:
    """What the settings name stays, and so does everything where the run went on to another device."""
    case = EngineCase(random_pipeline, make_config(attention="auto", linear="torch"))
    then = {"device": "cpu", "attention": "matmul", "train_attention": "native", "linear": "onednn"}
    case.engine.adopt(then)
    assert case.engine.measured() == {**then, "linear": "torch"}
    before = case.engine.measured()
    case.engine.adopt({**then, "device": "NVIDIA H200", "attention": "flash3"})
    assert case.engine.measured() == before
    rows = case.engine.attention_rows()
    assert [row["name"] for row in rows if row["chosen"]] == ["matmul", "native"]
