"""ONNX files give PyTorch's logits for batches of any shape; what cannot be trusted is not written."""

import pytest
import torch
from typer.testing import CliRunner

from rlkd.cli.main import app
from rlkd.errors import ConfigError, ModelError
from rlkd.models.encoders import onnx_export
from rlkd.models.encoders.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from rlkd.models.encoders.onnx_export import Agreement, export_onnx
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier


def saved(folder, kind="bert", **options):
    return save_pretrained(folder, tiny_classifier(kind, layers=2, **options), classifier_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_file_agrees_with_pytorch_on_texts_of_all_lengths(tmp_path, kind):
    import onnxruntime
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source, out = saved(tmp_path / "model", kind), tmp_path / "onnx"
    agreement = export_onnx(source, out)
    assert agreement.largest_difference < 1e-4
    assert (agreement.same_label, agreement.rows) == (1.0, 12)
    assert {path.name for path in out.iterdir()} == {
        "model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip

    # As a user runs it, from the folder alone.
    tokenizer, session = AutoTokenizer.from_pretrained(out), onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert [tuple(node.shape) for node in session.get_inputs()] == [("batch", "tokens")] * len(session.get_inputs())
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    wanted = [node.name for node in session.get_inputs()]
    for texts in (["a"], ["a b c d e f", "g"], ["x y z", "a b", "c " * 30, "d"]):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        (logits,) = session.run(None, {name: batch[name].numpy() for name in wanted})
        with torch.no_grad():
            expected = model(**{name: batch[name] for name in wanted}).logits
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)
    assert AutoConfig.from_pretrained(out).id2label == model.config.id2label


@pytest.mark.slow
def test_a_file_that_disagrees_is_not_kept(tmp_path):
    source, out = saved(tmp_path / "model"), tmp_path / "onnx"
    with pytest.raises(ModelError, match=r"ONNX and PyTorch differ by .* more than .*Nothing was written"):
        export_onnx(source, out, tolerance=0.0)
    assert not list(out.iterdir())


@pytest.mark.slow
def test_a_model_that_torch_cannot_export(tmp_path):
    source = save_pretrained(
        tmp_path / "model", BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=30)), classifier_tokenizer()
    )
    with pytest.raises(ModelError, match="torch cannot export a 'rlkd_bilstm' model to ONNX"):
        export_onnx(source, tmp_path / "onnx")


def test_models_that_are_not_classifiers_and_missing_packages(tmp_path, monkeypatch):
    save_pretrained(tmp_path / "bare", tiny_classifier().bert, classifier_tokenizer())
    with pytest.raises(ModelError, match="is a BertModel, not a sequence classifier"):
        export_onnx(tmp_path / "bare", tmp_path / "onnx")
    with pytest.raises(ModelError, match="model 'nobody/at-home' is neither a local folder"):
        export_onnx("nobody/at-home", tmp_path / "onnx")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ConfigError, match=r"ONNX needs onnxruntime: pip install 'rlkd\[onnx\]'"):
        export_onnx(tmp_path / "bare", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_the_command_says_how_well_they_agree(tmp_path, monkeypatch):
    asked = []

    def export(model, out, *, tolerance, allow_bin):
        asked.append((model, out, tolerance))
        return Agreement(1.5e-6, 1.0, 12)

    monkeypatch.setattr(onnx_export, "export_onnx", export)
    done = CliRunner().invoke(app, ["export-onnx", "a/model", str(tmp_path), "--tolerance", "0.01"])
    assert asked == [("a/model", tmp_path, 0.01)]
    assert "logits within 1.5e-06 of PyTorch's, same label in 100.0% of 12 random rows" in done.output
