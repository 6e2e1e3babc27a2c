"""Pretraining at a tiny budget: it learns, writes a loadable folder, and a killed run goes on as if it had not been."""

import json
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dgpo_fast.tiny import data, pretrain
from dgpo_fast.tiny.model import TEXT_TOKENS, build_pipeline, build_tokenizer
from tests.processes import CONTEXT, PythonProcess

SMALL = [
    *("--pictures", "64", "--autoencoder-steps", "3", "--transformer-steps", "8", "--autoencoder-batch", "4"),
    *("--transformer-batch", "8", "--misspelling-steps", "2", "--checkpoint-every-s", "0", "--evaluation-images", "6"),
]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--output", str(folder / "pipeline"), "--work", str(folder / "work"), *SMALL, *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "pipeline").rglob("*.safetensors"))
    assert len(files) == 4
    return {f"{f.parent.name}.{name}": tensor for f in files for name, tensor in load_file(f).items()}


def kill_after(arguments: list[str], checkpoint: Path, step: int) -> None:
    """Runs a pretraining and kills it (SIGKILL) once `checkpoint` holds at least `step` steps."""
    process = PythonProcess(["-m", "dgpo_fast.tiny.pretrain", *arguments])
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() or torch.load(checkpoint, weights_only=True)["step"] < step:
            assert process.returncode is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert pretrain.main(arguments(folder, "--processes", "1")) == 0
    return weights(folder)


def test_a_killed_and_resumed_run_gives_the_same_weights(whole, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    same = arguments(tmp_path, "--processes", "1")
    kill_after(same, tmp_path / "work" / "transformer.pt", 2)
    assert not (tmp_path / "pipeline").exists()
    assert pretrain.main(same) == 2 and "pass --resume" in capsys.readouterr().err
    assert pretrain.main([*same, "--resume", "--seed", "1"]) == 2
    assert "made with another seed" in capsys.readouterr().err

    assert pretrain.main([*same, "--resume"]) == 0
    resumed = weights(tmp_path)
    assert resumed.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], rtol=0, atol=0, msg=name)
    record = json.loads((tmp_path / "pipeline" / "pretraining.json").read_text())
    assert record["config"]["transformer_steps"] == 8 and 0 <= record["heldout"]["unguided"]["graded"] <= 1


def test_two_processes_give_the_weights_of_one(whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain, "multiprocessing", Mock(get_context=lambda _: CONTEXT))
    assert pretrain.main(arguments(tmp_path, "--processes", "2")) == 0
    shared = weights(tmp_path)
    moved = [(shared[name] - whole[name]).abs().max().item() for name in whole]
    # Adam's first steps enlarge rounding differences of gradients near zero up to the learning rate's size.
    assert np.mean(moved) < 1e-4


def test_losses_fall(tmp_path: Path):
    config = pretrain.Pretraining(
        pictures=64,
        autoencoder_steps=25,
        transformer_steps=25,
        misspelling_steps=0,
        autoencoder_batch=8,
        transformer_batch=32,
    )
    losses: dict[str, list[float]] = {"autoencoder": [], "transformer": []}

    def report(stage: pretrain.Stage, step: int, loss: torch.Tensor) -> None:
        losses[stage.name].append(loss.item())

    pretrain.pretrain(config, pretrain.Session(config, tmp_path, time.monotonic() + 600, report=report))
    for values in losses.values():
        assert len(values) == 25 and np.mean(values[-5:]) < 0.9 * np.mean(values[:5])


def test_time_over_leaves_a_checkpoint_and_a_pipeline(tmp_path: Path):
    config = pretrain.Pretraining(pictures=32)
    pipe = pretrain.pretrain(config, pretrain.Session(config, tmp_path, time.monotonic()))
    assert (tmp_path / "autoencoder.pt").exists() and not (tmp_path / "transformer.pt").exists()
    assert pipe.vae.config.scaling_factor != 1


def test_dataset_never_shows_heldout_prompts():
    prompts, pictures = pretrain.dataset(pretrain.Pretraining(pictures=3000))
    heldout = {text for text, _ in data.shape_prompts("heldout") + data.sign_prompts("heldout")}
    assert pictures.shape == (3000, 32, 32, 3) and pictures.dtype == np.uint8
    assert not heldout & {text for text, _ in prompts}
    assert sum(m["tag"] == "ocr" for _, m in prompts) == round(3000 * pretrain.Pretraining().sign_share)


def test_only_signs_are_misspelt_and_as_often_as_asked():
    config = pretrain.Pretraining(pictures=400, sign_share=0.25, misspelling=0.5)
    prompts, pictures = pretrain.dataset(config)
    changed = pretrain.misspelt(prompts, pictures, config)
    signs = np.array([m["tag"] == "ocr" for _, m in prompts])
    np.testing.assert_array_equal(changed[~signs], pictures[~signs])
    assert (changed[signs] != pictures[signs]).any((1, 2, 3)).mean() > 0.8
    rng = np.random.default_rng(0)
    letters = "".join(data.misspell("CAT", 0.5, rng) for _ in range(2000))
    kept = np.mean([a == b for a, b in zip(letters, "CAT" * 2000, strict=True)])
    assert kept == pytest.approx(0.5 + 0.5 / 26, abs=0.03)
    assert data.misspell("CAT", 0.0, rng) == "CAT"


def test_every_prompt_fits_and_tokenises_word_by_word():
    tokenizer = build_tokenizer()
    for text, metadata in data.all_prompts():
        assert tokenizer.tokenize(text) == text.split(), metadata
    longest = max(len(tokenizer(text).input_ids) for text, _ in data.all_prompts() + data.all_signs())
    assert longest <= TEXT_TOKENS == tokenizer.model_max_length


def test_words_on_signs_are_spelt_and_any_text_is_bytes():
    tokenizer = build_tokenizer()
    for _, metadata in data.all_signs():
        a, b, c = metadata["text"].lower()
        assert tokenizer.tokenize(metadata["prompt"])[-5:] == ['"</w>', a, b, f"{c}</w>", '"</w>']
    for text in ("Zoë!", "日本", "a\tcat", ""):
        tokens = tokenizer(text).input_ids
        assert tokenizer.eos_token_id not in tokens[1:-1]
        assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == text.lower().replace("\t", "")


def test_the_number_of_t5_slots_is_the_callers(tmp_path: Path):
    pipe = build_pipeline(0)
    for n in (0, 16, 256):
        embeds, _, pooled, _ = pipe.encode_prompt(
            ["a photo of a star"], None, None, do_classifier_free_guidance=False, max_sequence_length=n
        )
        assert embeds.shape == (1, TEXT_TOKENS + n, 128) and pooled.shape == (1, 128)


def test_same_seed_same_start():
    first, again, other = (build_pipeline(seed).transformer.state_dict() for seed in (0, 0, 1))
    name = "pos_embed.proj.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_processes_are_one_or_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert pretrain.main(arguments(tmp_path, "--processes", "0")) == 2
    assert capsys.readouterr().err == "--processes 0: use 1 on a GPU, and 1 or more on a CPU\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--autoencoder-steps", "many"], ["--no-such-option"]])
def test_bad_options_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(arguments)
    assert stopped.value.code == 2 and "usage" in capsys.readouterr().err
