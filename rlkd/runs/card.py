"""The model card of every saved student: what it is, how it was made, its scores and its limits."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from ..io.cards import CARD, cell, front_matter, table
from ..io.files import write_text
from ..metrics import held_out, in_order, metric

REWARD = (
    "reward_value", "lam", "gamma", "k_step", "length_normalised", "one_step", "cut_answers", "baseline",
    "kl_coef", "kl_target", "kl_in", "kl_estimator", "entropy_coef", "whiten_advantages", "loss_reduction",
    "rollouts_per_prompt", "rollout_temperature", "rollout_top_p", "teacher_mix", "importance_weight", "importance_cap",
    "imitation_coef", "entropy_in",
)  # fmt: skip
METHODS = {
    "GKDTrainer": "GKD: a divergence to the teacher on the student's own answers or on labels",
    "ReferenceTrainer": "supervised training on the references of its training data",
    "PPOTrainer": "PPO on the reward that the teacher's own log-probabilities induce",
    "ReinforceTrainer": "REINFORCE on the reward that the teacher's own log-probabilities induce",
    "SupervisedTrainer": "imitation of the teacher (sequence-level distillation, or a divergence to it on its answers)",
    "TKDTrainer": "distillation of an encoder-only classifier",
}
ALONE = "ReferenceTrainer"  # has no teacher
# Part of the name of a student's class -> what loads it, and the hub's name of the task: that of encoder-decoders
# (text2text-generation) is gone from transformers 5.
HEAD = {
    "Seq2SeqLM": ("AutoModelForSeq2SeqLM", "text-generation"),
    "CausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "TokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "Classification": ("AutoModelForSequenceClassification", "text-classification"),
}
# What the pipeline gives, where it is not the best label.
ANSWERS = {
    "multi_label_classification": "# The text has the labels with a score above 0.5, which may be none.",
    "regression": "# The score is the number.",
}
FOLDER = "path/to/this/folder"


def write_card(
    folder: Path, record: dict[str, Any], *, architecture: str, scores: dict[str, Any], rows: int | None, step: int
) -> None:
    """Write README.md into `folder`.

    record: content of run.json, secrets removed, with the student's `chat.chat_record`, and problem_type: what the
    outputs of a classifier are; architecture: class of the student; scores: the newest `eval_*` numbers ({} if it was
    never evaluated) on `rows` held-out rows; step: optimizer steps taken.
    """
    write_text(folder / CARD, card(record, architecture=architecture, scores=scores, rows=rows, step=step))


def card(record: dict[str, Any], *, architecture: str, scores: dict[str, Any], rows: int | None, step: int) -> str:
    """The card as Markdown with metadata; arguments as in `write_card`."""
    models, settings = record.get("models") or {}, record.get("settings") or {}
    trainer = str(record.get("trainer"))
    # The names of encoder-decoders' classes have no part in common.
    auto, task = HEAD[next((part for part in HEAD if part in architecture), "Seq2SeqLM")]
    seed = settings.get("seed", 42)
    numbers = {
        name.removeprefix("eval_"): scores[name]
        for name in in_order(scores)  # a resumed run reads its log back sorted
        if name.startswith("eval_") and not metric(name).is_timing
    }
    sections = [
        f"# {_named(models.get('student'), 'A student')} {_from_teacher(models)}",
        f"Trained with rlkd {record.get('rlkd')} for {step} steps by {METHODS.get(trainer, trainer)}.",
        "## Results",
        _results(numbers, rows, seed),
        "## Training",
        _training(record, settings),
        "## Use",
        _use(auto, architecture, settings, record),
        "## Limits",
        _limits(record, settings, auto),
        "## Command, settings, versions",
        _how(record, settings),
    ]
    return f"{front_matter(_metadata(models, record, task))}\n\n" + "\n\n".join(sections) + "\n"


def _from_teacher(models: dict[str, Any]) -> str:
    if not any(role.startswith("teacher") for role in models):
        return "trained without a teacher"
    return f"distilled from {_teachers(models, 'a teacher made in memory')}"


def _teachers(models: dict[str, Any], without: str) -> str:
    """The names of all teachers; `without`, of one that has none."""
    names = [_named(name, without) for role, name in models.items() if role.startswith("teacher")]
    return " and ".join(names) or without


def _metadata(models: dict[str, Any], record: dict[str, Any], task: str) -> dict[str, Any]:
    from huggingface_hub import ModelCardData

    sources = dict.fromkeys(d.get("source") for d in (record.get("data") or {}).values() if _on_hub(d.get("source")))
    student = models.get("student")
    data = ModelCardData(
        base_model=student if _on_hub(student) else None,
        datasets=list(sources) or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["rlkd", "knowledge-distillation", str(record.get("trainer")).removesuffix("Trainer").lower()],
    )
    return data.to_dict()


def _results(numbers: dict[str, Any], rows: int | None, seed: Any) -> str:
    if not numbers:
        return "Not evaluated."
    lines = [
        (name, held_out(name).quantity or "–", held_out(name).better, f"{value:.4g}")
        for name, value in numbers.items()
        if isinstance(value, (int, float))
    ]
    of = f"{rows} held-out rows, " if rows else ""
    return (
        f"One run ({of}seed {seed}); rlkd's docs/metrics.md defines these numbers. Those with `sample_` are of answers "
        f"sampled at temperature 1, the others of greedy ones.\n\n{table(('score', 'unit', 'better', 'value'), lines)}"
    )


def _training(record: dict[str, Any], settings: dict[str, Any]) -> str:
    models = record.get("models") or {}
    templates = ", ".join(cell(str(t.get("name"))) for t in record.get("templates") or []) or "none recorded"
    data = [
        (role, _named(d.get("source"), "made in memory"), d.get("rows"), d.get("fingerprint"))
        for role, d in (record.get("data") or {}).items()
    ]
    before = _named(models.get("student"), "not recorded")
    if record.get("trainer") == ALONE:
        column = settings.get("reference_column")
        lines = [
            f"- weights before training: {'random, of the size of ' if settings.get('random_weights') else ''}{before}",
            f"- templates of its inputs: {templates}",
            f"- answers that it learned: {f'column {cell(column)}' if column else 'the targets of the templates'}",
        ]
    else:
        lines = [
            f"- teacher: {_teachers(models, 'not recorded')}",
            f"- student before training: {before}",
            f"- templates of the teacher's inputs: {templates}",
        ]
    if chat := record.get("chat"):
        system = "none" if chat["system"] is None else cell(chat["system"])
        lines.append(
            f"- the student's prompts: in its chat template (digest {chat['template']}), system prompt {system}"
        )
    lines += [_labels(made) for d in (record.get("data") or {}).values() for made in d.get("labels") or []]
    if "reward_value" in settings:
        chosen = ", ".join(f"{name} {settings[name]}" for name in REWARD if name in settings)
        lines.append(f"- reward and credit: {cell(chosen)}")
    if "on_policy_fraction" in settings:
        names = ("objective", "on_policy_fraction", "alpha", "beta", "temperature")
        lines.append("- divergence: " + cell(", ".join(f"{name} {settings.get(name)}" for name in names)))
    if "preset" in settings:
        lines.append(f"- loss: preset {cell(str(settings['preset']))}")
    shown = table(("data", "source", "rows", "fingerprint"), data) if data else "The data are not recorded."
    return "\n".join(lines) + f"\n\n{shown}"


def _use(auto: str, architecture: str, settings: dict[str, Any], record: dict[str, Any]) -> str:
    """A snippet that answers as the student was evaluated, with transformers (and PEFT for an adapter) alone."""
    import transformers

    if "TokenClassification" in auto:
        return _python(
            "from transformers import pipeline",
            "",
            "# The tag of a word is that of its first token.",
            f'tag = pipeline("token-classification", model="{FOLDER}", aggregation_strategy="first")',
            'print(tag("A text."))',
        )
    if "Classification" in auto:
        kind = str(record.get("problem_type"))
        every = ", top_k=None" if kind == "multi_label_classification" else ""
        code = "" if hasattr(transformers, architecture) else ", trust_remote_code=True"  # code that rlkd saved with it
        return _python(
            "from transformers import pipeline",
            "",
            f'classify = pipeline("text-classification", model="{FOLDER}"{code})',
            f'print(classify("A text.", truncation=True, max_length={settings.get("max_length", 128)}{every}))',
            ANSWERS.get(kind),
            '# Of two texts: classify({"text": "One text.", "text_pair": "Another."}, ...)',
        )
    adapter = architecture.startswith("Peft")
    load = f"Auto{architecture}" if adapter else auto
    options = f', generation_config=GenerationConfig.from_pretrained("{FOLDER}")' if adapter else ""
    template = settings.get("student_template")
    # Decoder-only models give back the prompt as well.
    shown = "[:, inputs.input_ids.shape[1] :]" if "CausalLM" in load else ""
    return _python(
        f"from peft import {load}" if adapter else None,
        f"from transformers import {'AutoTokenizer, GenerationConfig' if adapter else f'{auto}, AutoTokenizer'}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")',
        f'model = {load}.from_pretrained("{FOLDER}")',
        f"# The student reads inputs under the template {cell(str(template))}." if template else None,
        *_inputs(settings.get("max_input_tokens", 512), record.get("chat")),
        f"answers = model.generate(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask{options})",
        f"print(tokenizer.batch_decode(answers{shown}, skip_special_tokens=True))",
    )


def _inputs(max_input_tokens: int, chat: dict[str, Any] | None) -> list[str]:
    """The lines that encode a text."""
    if chat is None:
        return [f'inputs = tokenizer(["A text."], truncation=True, max_length={max_input_tokens}, return_tensors="pt")']
    system = "" if chat["system"] is None else f'{{"role": "system", "content": {chat["system"]!r}}}, '
    return [
        "# It reads every input as the user's turn of its chat template.",
        f'messages = [{system}{{"role": "user", "content": "A text."}}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
    ]


def _python(*lines: str | None) -> str:
    code = "\n".join(line.replace("```", "") for line in lines if line is not None)
    return f"```python\n{code}\n```"


def _labels(made: dict[str, Any]) -> str:
    """A line on the labels of one generation: whose answers they are, and to what."""
    data = made.get("dataset") or (made.get("data") or {}).get("sha256")
    parts = [
        f"- labels: answers of {_named(made.get('teacher'), 'an unknown teacher')} ({made.get('revision')})",
        f"templates {', '.join(cell(str(name)) for name in made.get('templates') or []) or 'not recorded'}",
        f"strategy {made.get('strategy') or 'not recorded'}",
        f"data {_named(data, 'not recorded')}",
    ]
    return "; ".join(parts)


def _limits(record: dict[str, Any], settings: dict[str, Any], auto: str) -> str:
    train, alone = (record.get("data") or {}).get("train", {}), record.get("trainer") == ALONE
    lines = [
        f"- It was trained on {_named(train.get('source'), 'the training data above')} ({train.get('rows', '?')} "
        "rows) and evaluated on the held-out rows above only. Other tasks, domains and languages were not tested; no "
        "language is claimed.",
        f"- It inherits the errors and biases of its {'references' if alone else 'teacher or labels'}.",
    ]
    held_out = (record.get("data") or {}).get("eval", {})
    if shared := held_out.get("also_in_training"):
        lines.insert(1, f"- {shared} of {held_out.get('rows', '?')} held-out inputs are also training inputs.")
    if "max_new_tokens" in settings:
        lines.append(
            f"- In training, inputs were cut to {settings.get('max_input_tokens')} tokens and answers to "
            f"{settings['max_new_tokens']}."
        )
    elif "max_length" in settings:
        lines.append(f"- In training, texts were cut to {settings['max_length']} tokens.")
    if "Classification" not in auto:
        lines.append("- Its outputs were not checked for factual accuracy.")
    return "\n".join(lines)


def _how(record: dict[str, Any], settings: dict[str, Any]) -> str:
    versions = {"rlkd": record.get("rlkd"), **(record.get("versions") or {})}
    command = shlex.join([_file(part) for part in map(str, record.get("command") or [])])
    shown = {name: _file(value) if isinstance(value, str) else value for name, value in settings.items()}
    block = {
        "command": command,
        "git": record.get("git"),
        "started": record.get("started"),
        "versions": {name: value for name, value in versions.items() if value},
        "settings": shown,
    }
    return f"```yaml\n{yaml.safe_dump(block, sort_keys=False, allow_unicode=True).strip().replace('```', '')}\n```"


def _named(name: Any, missing: str) -> str:
    return cell(_file(str(name))) if name else missing


def _file(text: str) -> str:
    """The last part of an absolute path, so that no folder of this machine is published."""
    return Path(text).name if os.path.isabs(text) and len(Path(text).parts) > 1 else text


def _on_hub(name: Any) -> bool:
    """Whether a name is a hub id rather than a local folder or file."""
    return isinstance(name, str) and name.count("/") <= 1 and "." not in name[:1] and not Path(name).exists()
