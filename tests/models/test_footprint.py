"""Size and speed of classifiers, against sizes counted by hand and models of known duration."""

from types import SimpleNamespace

import pytest
import torch

from rlkd.models import footprint
from rlkd.models.footprint import count_parameters, latency, megabytes
from tiny import save_pretrained, tiny_classifier


def test_size_is_that_of_the_saved_file(tmp_path):
    model = tiny_classifier(layers=2, width=64)
    save_pretrained(tmp_path, model)
    assert megabytes(model) * 1e6 == pytest.approx((tmp_path / "model.safetensors").stat().st_size, rel=0.05)
    assert count_parameters(model) == sum(t.numel() for t in model.state_dict().values())
    assert megabytes(model.to(torch.bfloat16)) == pytest.approx(2e-6 * count_parameters(model))


def test_latency_is_the_median_per_sentence_of_passes_in_turns(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(footprint, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def model(name, seconds):
        def forward(input_ids):
            calls.append(name)
            now[0] += seconds[calls.count(name) - 1]

        return type("Model", (), {"device": torch.device("cpu"), "__call__": lambda self, **batch: forward(**batch)})()

    batch = {"input_ids": torch.zeros(4, 3)}
    models = {"slow": model("slow", [9, 2, 4, 100]), "fast": model("fast", [9, 1, 1, 3])}
    found = latency(models, {"slow": [batch], "fast": [batch]}, passes=3)
    assert found == {"slow": pytest.approx(1000.0), "fast": pytest.approx(250.0)}  # medians 4 and 1 of four sentences
    assert calls == ["slow", "fast"] * 4
    # Several batches are one pass.
    calls.clear()
    found = latency({"slow": model("slow", [1, 1, 3, 5])}, {"slow": [batch, batch]}, passes=1)
    assert found == {"slow": pytest.approx(1000.0)}
