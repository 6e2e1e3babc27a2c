"""Weights that are loaded: published names and sizes, what is missing, broken, of another kind or malicious."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.geneval import CLASSES
from dgpo_fast.rewards import golden, load_rewards
from dgpo_fast.rewards.device import on_device
from dgpo_fast.rewards.shipped import clip as clip_module
from dgpo_fast.rewards.shipped import geneval, hpsv2, imagereward, models
from dgpo_fast.rewards.shipped.aesthetic import AestheticReward
from dgpo_fast.rewards.shipped.clip import ClipScoreReward, PickScoreReward
from dgpo_fast.rewards.shipped.geneval import Detector, GenevalReward
from dgpo_fast.rewards.shipped.hpsv2 import HpsReward
from dgpo_fast.rewards.shipped.imagereward import ImageRewardReward
from tests.model_rewards import models as small
from tests.model_rewards.cases import TAUGHT, UNTRAINED, message, noise


def test_the_documented_local_copy(folder, tmp_path, monkeypatch):
    """The function in docs/rewards.md, with the small model's folder in place of the page's; its self-test runs."""
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(from dgpo_fast.rewards.shipped.clip .*?)```", page, re.DOTALL)
    spec = re.search(r"--rewards (my_models:\S+?)`", page)
    assert block and spec
    (tmp_path / "my_models.py").write_text(re.sub(r'"/models/\S+?"', repr(str(folder / "clip")), block[1]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    assert message(load_rewards, [spec[1]]).startswith("reward 'pickscore' failed its self-test: ")


def test_the_published_files_have_the_published_sizes():
    """The configurations that are read off files of the real size, and the sizes that docs/rewards.md gives."""
    from transformers import (
        BlipTextModel,
        BlipVisionModel,
        CLIPConfig,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    def millions(*networks: torch.nn.Module) -> int:
        return round(sum(p.numel() for network in networks for p in network.parameters()) / 1e6)

    with torch.device("meta"):
        weights = small.open_clip_weights(vision=(1280, 32, 257), text=(1024, 24, 77, 49408), projection=1024)
        config = hpsv2._config(weights)
        network = CLIPModel(config)
        renamed = hpsv2.rename(weights)
        assert {key: tuple(value.shape) for key, value in renamed.items()} == {
            key: tuple(value.shape) for key, value in network.named_parameters()
        }
        assert millions(network) == 986
        vision, text = config.vision_config, config.text_config
        assert (vision.num_attention_heads, vision.image_size, vision.patch_size) == (16, 224, 14)
        assert (text.num_attention_heads, text.eos_token_id) == (16, 49407)

        blip = imagereward._config(small.image_reward_weights((1024, 24, 197), (768, 12, 512, 30524)))
        vision, text = blip.vision_config, blip.text_config
        assert (vision.num_attention_heads, vision.image_size, text.num_attention_heads) == (16, 224, 12)
        assert millions(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)) == 445
        openai = CLIPConfig(
            projection_dim=768,
            text_config={"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
            vision_config={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
            },
        )
        assert millions(CLIPModel(openai)) == 428
        swin = SwinConfig(
            embed_dim=96,
            depths=[2, 2, 18, 2],
            num_heads=[3, 6, 12, 24],
            window_size=7,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        detector = Mask2FormerConfig(backbone_config=swin, num_labels=80)
        assert millions(Mask2FormerForUniversalSegmentation(detector)) == 69
    for published, found in (
        (hpsv2.PUBLISHED, config),
        (clip_module.PICKSCORE, config),
        (clip_module.OPENAI, openai),
        (imagereward.PUBLISHED, blip),
        (geneval.DETECTOR, detector),
    ):
        published.require("a", published.source, found)
    # Siblings: CLIP ViT-L/14 for ViT-H/14 and the reverse, L/14 for 336 pixels, and Mask2Former on Swin-T, -B and -L.
    large, clips = clip_module.OPENAI, "vision_config.hidden_size is"
    assert f"{clips} 1024 and not 1280" in message(hpsv2.PUBLISHED.require, "a", hpsv2.PUBLISHED.source, openai)
    assert f"{clips} 1280 and not 1024" in message(large.require, "a", large.source, config)
    openai.vision_config.image_size = 336
    assert "image_size is 336 and not 224" in message(large.require, "a", large.source, openai)
    for swin.embed_dim, swin.depths, seen in (
        (96, [2, 2, 6, 2], "depths is [2, 2, 6, 2] and not [2, 2, 18, 2]"),
        (128, [2, 2, 18, 2], "embed_dim is 128 and not 96"),
        (192, [2, 2, 18, 2], "embed_dim is 192 and not 96"),
    ):
        detector = Mask2FormerConfig(backbone_config=swin)
        assert seen in message(geneval.DETECTOR.require, "a", geneval.DETECTOR.source, detector)


PUBLISHED = {
    "clipscore": (ClipScoreReward, clip_module.OPENAI, "clip", "vision_config.patch_size is 8 and not 14"),
    "aesthetic": (AestheticReward, clip_module.OPENAI, "clip", "vision_config.patch_size is 8 and not 14"),
    "pickscore": (PickScoreReward, clip_module.PICKSCORE, "clip", "vision_config.patch_size is 8 and not 14"),
    "geneval-hf": (GenevalReward, geneval.DETECTOR, "mask2former", "backbone_config.embed_dim is 8 and not 96"),
    "hpsv2": (HpsReward, hpsv2.PUBLISHED, "HPS.pt", "vision_config.image_size is 56 and not 224"),
    "imagereward": (
        ImageRewardReward,
        imagereward.PUBLISHED,
        "BLIP.pt",
        "vision_config.hidden_size is 128 and not 1024",
    ),
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_another_model_under_the_published_name_is_refused(folder, tmp_path, monkeypatch, name):
    """By the name that is the default, here a folder in the working one, and by a copy that is named like it. Models
    of other names, as in all the tests here, are the user's own."""
    make, (published, _), file, seen = PUBLISHED[name]
    for place in (tmp_path / published, tmp_path / Path(published).name):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder / file)
    monkeypatch.chdir(tmp_path)
    remedy = "get that one, or give a model of your own another name (docs/rewards.md, models)"
    for given in ((), (tmp_path / Path(published).name,)):
        source = given[0] if given else published
        expected = f"reward {name!r}: {source} is not the published {published}, as its {seen}: {remedy}"
        assert message(make, *given) == expected


def test_models_that_cannot_be_had(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = tmp_path / "none"
    text = message(ClipScoreReward, missing)
    assert text.startswith(f"reward 'clipscore' needs {missing}, which cannot be loaded (")
    assert text.endswith("): check its path, or name a local copy (docs/rewards.md, models)")
    text = message(PickScoreReward, "nobody/none")
    assert text.startswith("reward 'pickscore' needs nobody/none, which cannot be loaded (")
    assert "`hf download nobody/none`" in text
    text = message(HpsReward, "nobody/none/file.pt", folder / "clip")
    assert "reward 'hpsv2' needs nobody/none/file.pt" in text and "`hf download nobody/none file.pt`" in text
    assert "needs" in message(ImageRewardReward, missing, folder / "bert")
    assert "needs" in message(AestheticReward, folder / "clip", missing)
    assert "needs" in message(GenevalReward, missing, folder / "clip")
    assert "needs" in message(GenevalReward, folder / "mask2former", missing)
    assert "needs" in message(PickScoreReward, folder / "clip", missing)


def test_models_of_another_kind(folder, tmp_path):
    text = message(Detector, small.save_mask2former(tmp_path / "stuff", labels=20))
    assert text.endswith("has not COCO's 80 classes in their order: wrong detector?")
    text = message(ClipScoreReward, folder / "mask2former")
    assert text.startswith("reward 'clipscore'")
    assert message(ImageRewardReward, folder / "HPS.pt", folder / "bert").endswith("wrong file?")
    assert message(HpsReward, folder / "BLIP.pt", folder / "clip").endswith("wrong file?")
    assert message(HpsReward, folder / "predictor.pth", folder / "clip").endswith("wrong file?")
    text = message(AestheticReward, folder / "clip", folder / "HPS.pt")
    assert text == f"reward 'aesthetic': layers.0 of {folder / 'HPS.pt'} does not fit: wrong file?"


def test_labels_in_another_order(folder, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder / "mask2former")
    model.config.id2label = {number: CLASSES[number - 1] for number in range(80)}
    model.save_pretrained(tmp_path / "shifted")
    assert "in their order" in message(Detector, tmp_path / "shifted")
    # Other names for some classes, as on the hub, do not matter.
    model.config.id2label = dict(enumerate(CLASSES)) | {3: "motorbike", 57: "sofa", 64: "mouse"}
    model.save_pretrained(tmp_path / "renamed")
    Detector(tmp_path / "renamed")


def test_incomplete_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    small.save_clip(tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    lacking = "text_model.encoder.layers.1.mlp.fc1.weight"
    save_file({key: value for key, value in weights.items() if key != lacking}, file, metadata={"format": "pt"})
    expected = f"reward 'clipscore': {tmp_path / 'clip'} lacks 1 weights, {lacking} first: wrong model?"
    assert message(ClipScoreReward, tmp_path / "clip") == expected
    file.write_bytes(file.read_bytes()[:1000])
    assert message(ClipScoreReward, tmp_path / "clip").startswith("reward 'clipscore' needs")

    weights = small.image_reward_weights()
    del weights["blip.text_encoder.encoder.layer.1.output.dense.bias"]
    torch.save(weights, tmp_path / "ir.pt")
    expected = (
        f"reward 'imagereward': {tmp_path / 'ir.pt'} lacks the weight encoder.layer.1.output.dense.bias: wrong file?"
    )
    assert message(ImageRewardReward, tmp_path / "ir.pt", folder / "bert") == expected
    weights = small.open_clip_weights()
    weights["visual.proj"] = weights["visual.proj"][:, :50]
    torch.save(weights, tmp_path / "hps.pt")
    text = message(HpsReward, tmp_path / "hps.pt", folder / "clip")
    assert text.endswith("the weight visual_projection.weight is (50, 160) instead of (96, 160): wrong file?")


def test_files_that_are_no_weights(folder, tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    expected = f"reward 'hpsv2': {tmp_path / 'list.pt'} is no file of PyTorch weights"
    assert message(HpsReward, tmp_path / "list.pt", folder / "clip") == expected
    (tmp_path / "page.pt").write_text("<html>404</html>")
    assert message(HpsReward, tmp_path / "page.pt", folder / "clip").startswith("reward 'hpsv2' needs")


class Malicious:
    def __reduce__(self):
        return (print, ("code from a weights file",))


def test_weights_run_no_code(folder, tmp_path, capsys):
    torch.save({"weight": Malicious()}, tmp_path / "evil.pt")
    assert message(HpsReward, tmp_path / "evil.pt", folder / "clip").startswith("reward 'hpsv2' needs")
    assert "code from" not in capsys.readouterr().out


def test_no_gradients_and_no_random_layers(untrained):
    for name in ("clipscore", "hpsv2"):
        network = untrained(name)._clip.model
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    reward = untrained("imagereward")
    for network in (reward._vision, reward._text, reward._head, untrained("geneval-hf")._detector._model):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_importing_rewards_is_light():
    code = (
        "import sys, dgpo_fast.rewards, dgpo_fast.rewards.registry; "
        "assert not {'torch', 'transformers', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_group_through_the_weighted_sum(folder, untrained):
    from dgpo_fast.rewards import WeightedReward

    both = WeightedReward(
        {"clipscore": untrained("clipscore"), "hpsv2": untrained("hpsv2")}, {"clipscore": 1, "hpsv2": 2}
    )
    scores = both.score_groups(noise(4, 64, 64), [Prompt("a cat"), Prompt("a dog")], 2)
    assert scores.valid.all() and not scores.failures
    np.testing.assert_allclose(scores.rewards, scores.parts["clipscore"] + 2 * scores.parts["hpsv2"], rtol=1e-5)


@pytest.mark.parametrize("name", TAUGHT)
def test_models_stay_on_the_device_that_they_were_loaded_for(taught, monkeypatch, name):
    """Whatever this process's current device is later, as where the trainer moves on to a GPU of its own."""
    reward = taught(name)
    monkeypatch.setattr(models, "default_device", lambda: torch.device("meta"))
    images = np.repeat(golden.photo(), 2, axis=0)
    person = {"include": [{"class": "person", "count": 1, "color": "red"}]}
    scores = reward(images, ["a photo of a person"] * 2, [person] * 2)
    scores = scores[0] if isinstance(scores, tuple) else scores
    assert np.isfinite(scores).all()


def test_rewards_are_loaded_on_the_device_that_is_named(folder):
    """`load_rewards(…, device)` decides where a model goes, not the GPUs of the machine."""
    with on_device(torch.device("meta")):
        assert models.default_device().type == "meta"
    assert models.default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
