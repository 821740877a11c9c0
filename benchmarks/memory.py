"""What `rlkd estimate` says of memory, over what training takes: SeqKD and PPO of a T5- and a Llama-shaped student.

    python benchmarks/memory.py --quick

Each training is a process of its own with random weights in float32 on a CPU: two updates, the second of which has an
optimizer's state. Measured is the peak of resident memory (Linux) above its level after the same training of a tiny
model, which has imported everything; what the C library's allocator keeps is in it. The estimate knows tensors alone.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from typing import Any

from common import arguments, peak_extra_memory, report, show

VOCAB = 16_384
PROMPT, ANSWER = 96, 32
SHAPES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 512, "d_kv": 64, "d_ff": 1536, "num_layers": 4, "num_heads": 8, "decoder_start_token_id": 0},
    "llama": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
              "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
}  # fmt: skip
COMMON: dict[str, Any] = {"max_input_tokens": PROMPT, "max_new_tokens": ANSWER, "use_cpu": True, "report_to": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "seqkd": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2},
    "ppo": {"per_device_train_batch_size": 8, "max_steps": 2, "epochs_per_rollout": 1, "rollouts_per_prompt": 2},
}
TEACHER_CACHE = 64 * 2**20


TINY = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip


def config_of(shape: str, *, tiny: bool = False) -> Any:
    from transformers import LlamaConfig, T5Config

    tiny = tiny or "--once" in sys.argv
    kind, sizes = {"t5": T5Config, "llama": LlamaConfig}[shape], SHAPES[shape]
    sizes = {name: TINY.get(name, value) if tiny else value for name, value in sizes.items()}
    return kind(vocab_size=VOCAB, dropout_rate=0.0, **sizes)


def arguments_of(job: str, folder: str) -> Any:
    from rlkd.trainers.arguments import PPOArguments, SupervisedArguments

    kind = {"seqkd": SupervisedArguments, "ppo": PPOArguments}[job]
    return kind(output_dir=folder, save_strategy="no", disable_tqdm=True, **COMMON, **SETTINGS[job])


def train(shape: str, job: str) -> int:
    """Bytes at the peak of the training in this process above its level after the same training of a tiny model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    from rlkd.models.architectures import language_model
    from rlkd.models.teacher import Teacher
    from rlkd.records import Example
    from rlkd.trainers.ppo import PPOTrainer
    from rlkd.trainers.supervised import SupervisedTrainer

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=10**6
    )
    rows = SETTINGS[job]["per_device_train_batch_size"] * SETTINGS[job].get("gradient_accumulation_steps", 1) * 2
    texts = [" ".join(f"w{(97 * i + j) % 9000}" for j in range(PROMPT - i % 2)) for i in range(rows)]
    answers = [" ".join(f"w{(31 * i + j) % 9000}" for j in range(ANSWER - i % 2)) for i in range(rows)]
    kind = AutoModelForSeq2SeqLM if shape == "t5" else AutoModelForCausalLM

    def run(tiny: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            student, model = (kind.from_config(config_of(shape, tiny=tiny)) for _ in range(2))
            teacher = Teacher(language_model(model, tokenizer), tokenizer, PROMPT, cache_bytes=TEACHER_CACHE)
            args = arguments_of(job, folder)
            if job == "ppo":
                examples = [Example(str(i), text, (text,)) for i, text in enumerate(texts)]
                PPOTrainer(student, args, teacher=teacher, tokenizer=tokenizer, train_examples=examples).train()
                return
            labels = [{"student_input": a, "label": b} for a, b in zip(texts, answers, strict=True)]
            SupervisedTrainer(student, args, teacher=teacher, tokenizer=tokenizer, train_dataset=labels).train()

    run(tiny=True)
    gc.collect()
    return peak_extra_memory(run)


def estimated(shape: str, job: str) -> int:
    """Bytes of the largest phase according to the estimate."""
    from rlkd.jobs.memory import Rehearsal
    from rlkd.jobs.teachers import OBJECTIVES
    from rlkd.models.spec import ModelSpec
    from rlkd.settings.trl_compat import ModelConfig

    with tempfile.TemporaryDirectory() as folder:
        config_of(shape).save_pretrained(folder)
        args = arguments_of(job, folder)
        specs = [ModelSpec(folder, role) for role in ("student", "teacher")]
        phases = Rehearsal(specs[0], ModelConfig(), specs[1:], args, OBJECTIVES[type(args)](args)).phases()
    for phase in phases:
        print(phase.name, {name: round(size / 1e6) for name, size in phase.parts.items()}, file=sys.stderr)
    return max(phase.total for phase in phases)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs=2, metavar=("SHAPE", "JOB"), help="one training, in this process")
    parser.add_argument("--cases", nargs="*", default=[f"{s}_{j}" for s in SHAPES for j in SETTINGS])
    args = parser.parse_args()
    if args.only:
        print(json.dumps({"bytes": train(*args.only)}))
        return
    figures, rows = {}, []
    for case in args.cases[:1] if args.once else args.cases:
        shape, job = case.split("_")
        command = [sys.executable, __file__, "--only", shape, job, *(["--once"] if args.once else [])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured, said = json.loads(done.stdout.splitlines()[-1])["bytes"], estimated(shape, job)
        print(f"{case}: {said / 1e6:,.0f} MB of {measured / 1e6:,.0f}", file=sys.stderr)
        figures[f"{case}_estimate_over_measured"] = said / measured
        rows.append([shape, job, f"{said / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{said / measured:.3f}"])
    show("Peak of memory, MB", ["student", "job", "estimate", "measured", "ratio"], rows)
    figures["largest_deviation"] = max(abs(ratio - 1) for ratio in figures.values())
    report(figures)


if __name__ == "__main__":
    main()
