"""`rlkd estimate` against PyTorch's own account of real trainings, files on disk and transformers' count of steps."""

import gc
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, T5Config

from rlkd.cli.main import main
from rlkd.errors import ConfigError, ModelError
from rlkd.jobs import estimate as estimates
from rlkd.jobs.encoder_memory import EncoderRehearsal
from rlkd.jobs.memory import Phase, Rehearsal
from rlkd.jobs.teachers import OBJECTIVES
from rlkd.models.architectures import language_model
from rlkd.models.spec import ModelSpec
from rlkd.models.teacher import Teacher
from rlkd.models.weightless import Ledger, fake_weights, size_of, without_memory
from rlkd.records import Example
from rlkd.settings.trl_compat import ModelConfig
from rlkd.trainers.arguments import PPOArguments, SupervisedArguments
from rlkd.trainers.encoders.arguments import TKDArguments
from rlkd.trainers.ppo import PPOTrainer
from rlkd.trainers.supervised import SupervisedTrainer
from tiny import EOS, PAD, WORDS, save_pair, tiny_tokenizer

PROMPT, ANSWER, VOCAB = 48, 12, 1000  # of so many words that an untrained student hardly ever ends an answer
ALL_WORDS = [*WORDS, *(f"x{i}" for i in range(VOCAB - len(WORDS)))]
CONFIGS = {
    "t5": T5Config(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
                   decoder_start_token_id=PAD),
    "llama": LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                         num_attention_heads=4, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS),
}  # fmt: skip
OPTIONS = {
    "seqkd": {"gradient_accumulation_steps": 2},
    "forward_kl": {"objective": "forward_kl"},
    "ppo": {"rollouts_per_prompt": 2, "epochs_per_rollout": 1},
    "checkpointed": {"gradient_checkpointing": True},
}


def arguments(case, folder, **more):
    kind = PPOArguments if case == "ppo" else SupervisedArguments
    shared = {"max_steps": 2, "per_device_train_batch_size": 8, "max_input_tokens": PROMPT, "max_new_tokens": ANSWER}
    shared |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return kind(output_dir=str(folder), **(shared | OPTIONS.get(case, {}) | more))


def built(shape):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if shape == "t5" else AutoModelForCausalLM
    return kind.from_config(CONFIGS[shape]).eval()


def trainer_of(shape, case, args):
    tokenizer = tiny_tokenizer(ALL_WORDS)
    teacher = Teacher(language_model(built(shape), tokenizer), tokenizer, PROMPT, cache_bytes=0)
    texts = [" ".join("abcdefgh"[(i + j * j) % 8] for j in range(PROMPT - 1 - i % 2)) for i in range(32)]
    if case == "ppo":
        examples = [Example(str(i), text, (text,)) for i, text in enumerate(texts)]
        return PPOTrainer(built(shape), args, teacher=teacher, tokenizer=tokenizer, train_examples=examples)
    rows = [{"student_input": text, "teacher_input": text, "label": text[: 2 * (ANSWER - 1 - i % 2) - 1]}
            for i, text in enumerate(texts)]  # fmt: skip
    return SupervisedTrainer(built(shape), args, teacher=teacher, tokenizer=tokenizer, train_dataset=rows)


def rehearsal(shape, case, folder):
    CONFIGS[shape].save_pretrained(folder / "config")
    args = arguments(case, folder / "out")
    objective = next(made for kind, made in OBJECTIVES.items() if isinstance(args, kind))(args)
    specs = [ModelSpec(str(folder / "config"), role) for role in ("student", "teacher")]
    return Rehearsal(specs[0], ModelConfig(), specs[1:], args, objective)


def peak_of(run):
    """Most bytes in use above those at the start, as PyTorch's profiler recorded each allocation and release."""
    gc.collect()  # what earlier trainings release would count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "case"),
    [
        ("t5", "seqkd"),
        ("t5", "ppo"),
        ("llama", "seqkd"),
        ("llama", "ppo"),
        ("t5", "forward_kl"),
        ("llama", "checkpointed"),
    ],
)
def test_memory_is_that_of_a_real_training_within_15_percent(tmp_path, shape, case):
    trainer = trainer_of(shape, case, arguments(case, tmp_path / "run"))
    held = sum(map(size_of, filter(None, (trainer.policy, trainer.teacher.model, trainer.reference))))
    measured = held + peak_of(trainer.train)
    phases = rehearsal(shape, case, tmp_path).phases()
    said = max(phase.total for phase in phases)
    assert said / measured == pytest.approx(1, abs=0.15), [(phase.name, phase.parts) for phase in phases]


def test_the_ledger_counts_bytes_and_operations_of_a_layer_by_hand():
    rows, width = 6, 32
    with without_memory():
        layer, ledger = fake_weights(torch.nn.Linear(width, width, bias=False)), Ledger()
        x = torch.zeros(rows, width)
        with ledger:
            out = layer(x).relu()
            assert (ledger.now, ledger.operations) == (4 * rows * width, 2 * rows * width**2)  # the product is gone
            out.sum().backward()
    # Kept: the output and the gradient of the weight.
    assert ledger.now == 4 * (rows * width + width**2)
    assert ledger.operations == 4 * rows * width**2
    assert ledger.peak > ledger.now


def test_an_encoder_and_its_teachers_fine_tuning(tmp_path):
    config = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    args = TKDArguments(output_dir=str(tmp_path), preset="kd", max_length=8, per_device_train_batch_size=4,
                        gradient_accumulation_steps=2, use_cpu=True, report_to="none")  # fmt: skip
    small = BertConfig(**{**config.to_dict(), "num_hidden_layers": 1})
    made = EncoderRehearsal(small, config, True, args)
    fine_tuning, update = made.phases()
    ids = torch.full((4, 8), 5)
    for name, of in (("fine-tuning", config), ("update", small)):
        model = BertForSequenceClassification(of).train()
        with FlopCounterMode(display=False) as counted:
            model(ids).logits.sum().backward()
            if name == "update":
                BertForSequenceClassification(config).eval().requires_grad_(False)(ids)
        assert made.operations[name] == counted.get_total_flops()
    weights = sum(p.numel() for p in BertForSequenceClassification(config).parameters()) * 4
    assert fine_tuning.parts["gradients"] == weights <= fine_tuning.parts["teacher"]
    assert fine_tuning.parts["optimizer state"] == pytest.approx(2 * weights, rel=0.01)
    assert update.parts["teacher"] == fine_tuning.parts["teacher"] > update.parts["student"]


def test_whole_numbers_are_real_and_lengths_can_be_read():
    with without_memory():
        weights, ledger = torch.zeros(5, 3), Ledger()
        with ledger:
            mask = torch.arange(4)[None] < torch.tensor([[2], [3]])
            assert mask.sum(1).tolist() == [2, 3]
            assert weights[:4].expand(2, 4, 3)[mask].shape == (5, 3)


def test_a_head_that_checkpoints_have_of_their_own_is_counted(tmp_path):
    counts = {}
    for tied in (True, False):
        config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                          decoder_start_token_id=0, **({} if tied else {"tie_word_embeddings": False}))  # fmt: skip
        config.save_pretrained(tmp_path)
        made = Rehearsal(ModelSpec(str(tmp_path), "student"), ModelConfig(), [], arguments("seqkd", tmp_path / "o"),
                         OBJECTIVES[SupervisedArguments](arguments("seqkd", tmp_path / "o")))  # fmt: skip
        with without_memory():
            counts[tied] = made.parameters()["student"]
    assert counts[False] - counts[True] == 50 * 16


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe with tiny models; returns what estimates it: the JSON of `rlkd estimate`."""
    monkeypatch.chdir(tmp_path)
    teacher, student = save_pair(tmp_path / "models")
    rows = [{"note": f"a {i % 10} {i // 10}", "answer": "a"} for i in range(21)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(capsys, name="ppo_mine.yaml", flags=(), **settings):
        common = {"teacher": teacher, "teacher_dtype": "float32", "model_name_or_path": student, "max_steps": 8,
                  "dataset": "rows.jsonl", "input_column": "note", "output_dir": "out", "max_input_tokens": 16,
                  "max_new_tokens": 6, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 4,
                  "save_steps": 4, **settings}  # fmt: skip
        Path(name).write_text(json.dumps(common))  # JSON is YAML
        with pytest.raises(SystemExit) as end:
            main(["estimate", name, "--json", *flags])
        output = capsys.readouterr()
        return (json.loads(output.out) if output.out else {}), end.value.code, output.err

    return run


def without_rehearsal(monkeypatch):
    """Memory is not estimated, which takes seconds."""

    def phases(self):
        self.operations["update"] = 10**12
        return [Phase("update", {"student": 10**6})]

    monkeypatch.setattr(Rehearsal, "phases", phases)
    monkeypatch.setattr(Rehearsal, "saved", lambda self: (1, 1))
    monkeypatch.setattr(Rehearsal, "parameters", lambda self: {})


def test_no_weights_are_read_and_a_part_that_is_not_there_is_not_counted(recipe, capsys):
    for weights in Path("models").rglob("*.safetensors"):
        weights.unlink()
    found, code, error = recipe(capsys)
    assert not error
    parts = {name for phase in found["phases"] for name in phase["parts"]}
    assert code == 0
    assert {"reference policy", "teacher", "gradients"} <= parts
    assert "behaviour policy" not in parts
    adapted, _, _ = recipe(
        capsys, "reinforce.yaml", use_peft=True, sync_every=2, lora_target_modules=["q", "v"], lora_r=2
    )
    assert adapted["disk"]["student"] < found["disk"]["student"] / 4
    parts = adapted["phases"][0]["parts"]
    assert parts["reference policy"] == parts["behaviour policy"] == adapted["disk"]["student"]


def test_what_is_saved_is_as_large_as_said(recipe, capsys):
    found, _, _ = recipe(capsys)
    with pytest.raises(SystemExit) as end:
        main(["train", "ppo", "--config", "ppo_mine.yaml", "--eval_strategy", "no"])
    assert end.value.code == 0
    files = ("model.safetensors", "optimizer.pt", "value_head.safetensors")
    sizes = {name: Path("out/checkpoint-8", name).stat().st_size for name in files}
    assert sizes["model.safetensors"] == pytest.approx(found["disk"]["student"], rel=0.3)
    assert sum(sizes.values()) == pytest.approx(found["disk"]["checkpoint"], rel=0.5)
    made = {path.name for path in Path("out").glob("checkpoint-*")}
    assert (
        found["disk"]["checkpoints and student"] == found["disk"]["student"] + len(made) * found["disk"]["checkpoint"]
    )


@pytest.mark.parametrize(("rows", "batch", "accumulation", "epochs"), [(7, 2, 2, 2), (8, 4, 1, 3), (5, 2, 4, 1.5)])
def test_updates_are_those_of_the_trainer(tmp_path, rows, batch, accumulation, epochs):
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = arguments("plain", tmp_path, max_steps=-1, num_train_epochs=epochs, **settings)
    trainer = trainer_of("t5", "seqkd", args)
    trainer.train_dataset = trainer.train_dataset[:rows]
    found = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert estimates._updates(args, rows, 1) == found[-1 if isinstance(found[-1], int) else 6]


def test_rows_are_counted_where_they_are_and_asked_for_where_not(recipe, capsys, monkeypatch):
    without_rehearsal(monkeypatch)
    found, _, _ = recipe(capsys, max_steps=-1, num_train_epochs=2, eval_fraction=0.1, rollouts_per_prompt=2)
    assert found["updates"] == 19 // 4 * 4 * 2  # batches of 4 prompts, four updates on each
    found, _, _ = recipe(capsys, max_steps=-1, dataset="owner/name")
    assert found["updates"] is None
    assert found["hours"] is None
    found, _, _ = recipe(capsys, flags=["--rows", "40", "--tflops", "1"], max_steps=-1, num_train_epochs=1,
                         dataset="owner/name", rollouts_per_prompt=2)  # fmt: skip
    assert found["hours"] == pytest.approx(40 * found["operations"] / 1e12 / 3600)


def test_a_few_updates_are_timed_and_nothing_of_them_is_kept(recipe, capsys, monkeypatch):
    without_rehearsal(monkeypatch)
    found, code, _ = recipe(capsys, flags=["--measure", "2"])
    assert code == 0
    assert found["seconds_per_update"] > 0
    assert not Path("out").exists()
    assert found["hours"] == pytest.approx(8 * found["seconds_per_update"] / 3600)


@pytest.mark.parametrize(
    ("flags", "name", "settings", "words"),
    [
        ([], "mine.yaml", {}, "which job of `rlkd train` is it for"),
        (["--device-memory", "0.000001"], "ppo_mine.yaml", {}, "the training needs 0.0 GB in the phase"),
        (["--tflops", "1", "--measure", "1"], "ppo_mine.yaml", {}, "both give a speed"),
        ([], "ppo_mine.yaml", {"load_in_4bit": True}, "quantized weights is not estimated"),
    ],
)
def test_errors_are_one_line(recipe, capsys, monkeypatch, flags, name, settings, words):
    without_rehearsal(monkeypatch)
    _, code, error = recipe(capsys, name, flags, **settings)
    assert code == ConfigError.exit_code
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_a_model_that_does_not_run_without_weights_is_said(tmp_path, monkeypatch):
    def fail(self):
        raise NotImplementedError("an operation of its own")

    monkeypatch.setattr(Rehearsal, "phases", fail)
    monkeypatch.setattr(estimates, "_language", lambda *_: (rehearsal("t5", "seqkd", tmp_path), []))
    with pytest.raises(ModelError, match=r"does not run without weights \(NotImplementedError"):
        estimates.estimate("seqkd", [object(), arguments("seqkd", tmp_path)])
