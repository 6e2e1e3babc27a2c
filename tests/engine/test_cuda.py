"""The engine on a GPU: recorded, compiled and overlapped, it computes what the plain path computes there."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgpo_fast.config.options import Config, Engine
from dgpo_fast.engine import attention
from dgpo_fast.engine.decoder import Decoder
from dgpo_fast.engine.fp8 import Float8Copy
from dgpo_fast.engine.graphs import CudaGraphs
from dgpo_fast.engine.recorded import RecordedRollouts
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import predict
from dgpo_fast.models.latents import decode_plainly
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.schedule import make_schedule
from tests.engine.cases import EngineCase, make_config

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
CUDA = torch.device("cuda")
ATTENTION = ("native", "native_flash", "native_cudnn", "flash", "flash3", "xformers", "matmul")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(torch.linalg.norm(found.double() - expected.double()) / torch.linalg.norm(expected.double()))


def assert_as_exact(found: torch.Tensor, plain: torch.Tensor, config: Config, folder: Path) -> None:
    """At most twice as far from float64's gradient as the plain way in bf16: two bf16 programs may be 0.1 apart."""
    exact = EngineCase(folder, config, torch.float64).gradient()[1]
    assert relative(found.cpu(), exact) <= 2 * relative(plain.cpu(), exact)


@pytest.mark.parametrize("compiled", ["off", "on"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replayed_rollouts(
    compiled: str, dtype: torch.dtype, random_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under one recording: other noise, prompts and weights, and a partial last batch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which rounds differently at another batch size
    plain = EngineCase(random_pipeline, make_config(), dtype, CUDA)
    fast = EngineCase(random_pipeline, make_config(cuda_graphs="on", compile=compiled), dtype, CUDA)
    for draw, prompts in enumerate((["a cat"], ["two birds", "a house"], ["a dog"])):
        for case in (plain, fast):
            case.new = {name: weight + 0.02 for name, weight in case.new.items()}
        bound = 1e-4 if dtype == torch.float32 else 0.05
        assert relative(fast.rollout(prompts, draw), plain.rollout(prompts, draw)) < bound
    assert isinstance(fast.engine.solve, RecordedRollouts) and len(fast.engine.solve.recordings) == 1


def test_replayed_rollouts_with_noise(random_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under one recording: the noise of each draw, and the steps that an objective learns from."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = EngineCase(random_pipeline, make_config(), torch.float32, CUDA)
    fast = EngineCase(random_pipeline, make_config(cuda_graphs="on"), torch.float32, CUDA)
    plain.draw = fast.draw = Draw(make_schedule("euler", 4, 3.0, noise_level=0.7).to(CUDA), Guidance(3.0), 5)
    for number in (4, 9):
        drawn = [case.rollout(number=number, keep=True) for case in (plain, fast)]
        assert relative(*drawn) < 1e-4
        assert relative(fast.transitions.states, plain.transitions.states) < 1e-4
        assert torch.allclose(fast.transitions.log_prob, plain.transitions.log_prob, atol=1e-5)
    assert len(fast.engine.solve.recordings) == 1


def test_another_thread_may_allocate_during_a_recording() -> None:
    """As a reward on the GPU does, beside the first rollout."""
    stop, x = threading.Event(), torch.ones(4, device=CUDA)

    def allocate() -> None:
        while not stop.is_set():
            torch.cuda.empty_cache()
            torch.empty(1 << 22, device=CUDA).sum().item()

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        output, replay = CudaGraphs(CUDA).record(lambda: (x * 2).cumsum(0))
    finally:
        stop.set()
        thread.join()
    x.fill_(3)
    replay()
    assert output.tolist() == [6, 12, 18, 24]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_compiled_training_step(train: str, random_pipeline: Path) -> None:
    savings: dict[str, Any] = {"compile": "on", "batch_timesteps": True, "skip_equal_groups": True}
    plain = EngineCase(random_pipeline, make_config(train), torch.bfloat16, CUDA)
    fast = EngineCase(random_pipeline, make_config(train, **savings), torch.bfloat16, CUDA)
    (loss, gradient), (fast_loss, fast_gradient) = plain.gradient(), fast.gradient()
    assert abs(fast_loss - loss) < 1e-2 * abs(loss)
    assert_as_exact(fast_gradient, gradient, make_config(train), random_pipeline)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_kernels(name: str, random_pipeline: Path) -> None:
    problem = attention.obstacle(name, CUDA, torch.bfloat16, ())
    if problem:
        pytest.skip(f"{name}: {problem}")
    plain = EngineCase(random_pipeline, make_config(), torch.bfloat16, CUDA)
    other = EngineCase(random_pipeline, make_config(attention=name), torch.bfloat16, CUDA)
    assert relative(other.rollout(), plain.rollout()) < 0.05
    assert_as_exact(other.gradient()[1], plain.gradient()[1], make_config(), random_pipeline)


def test_auto_on_a_gpu(random_pipeline: Path) -> None:
    """It chooses an attention kernel by time, compiles, and says so."""
    config = make_config(**dict.fromkeys(("compile", "attention", "linear", "decoder"), "auto"))
    case = EngineCase(random_pipeline, config, torch.bfloat16, CUDA)
    chosen = [row for row in case.engine.attention_rows() if row["chosen"]]
    assert case.engine.choices.compile and case.engine.choices.linear == "torch" and len(chosen) == 2
    assert any("blocks are compiled" in line for line in case.engine.reasons.lines)
    assert Engine().overlap and case.engine.decoder.overlaps


def test_decoding_beside_the_rollout(random_pipeline: Path) -> None:
    """On a stream of its own, while the latents' stream goes on and reuses their memory."""
    case = EngineCase(random_pipeline, make_config(), torch.bfloat16, CUDA)
    decoder = Decoder(case.pipeline.vae, 3, way="fast", compiled=False, overlap=True, note=lambda line: None)
    generator = torch.Generator(CUDA).manual_seed(0)
    batches = [torch.randn(7, *case.sampler.shape, device=CUDA, generator=generator) for _ in range(4)]
    expected = [decode_plainly(case.pipeline.vae, batch, 7).images for batch in batches]
    waiting = []
    while batches:
        waiting.append(decoder.start(batches.pop(0)))
        torch.full((7, *case.sampler.shape), 100.0, device=CUDA)  # may take the memory of the latents just let go
    for wait, images in zip(waiting, expected, strict=True):
        assert np.abs(wait().images.astype(int) - images).mean() < 1


def test_float8_rollouts(random_pipeline: Path) -> None:
    pytest.importorskip("torchao")
    case = EngineCase(random_pipeline, make_config(), torch.bfloat16, CUDA)
    copied, batch = Float8Copy(case.models.behaviour), case.batch()
    case.models.after_load.append(copied.refresh)
    case.models.load_behaviour(case.new)
    timestep = torch.tensor(700.0, device=CUDA)
    with torch.no_grad():
        exact = predict(case.models.behaviour, batch.x0, timestep, batch.text)
        assert 0 < relative(predict(copied.transformer, batch.x0, timestep, batch.text), exact) < 0.15
