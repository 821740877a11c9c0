"""The sizing table of docs/scale.md: `rlkd estimate` of our recipes with teachers of 3, 7 and 11 billion parameters.

    python benchmarks/sizing.py

Nothing is measured and nothing loads: models are configurations of published shapes, with one template. --once takes
one layer of each model.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import arguments, report

TFLOPS = 150.0  # that a device is taken to reach
T5 = {"vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
      "tie_word_embeddings": False}  # fmt: skip
LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096, "pad_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "T0-3B": {**T5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "T0-11B": {**T5, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
    "T5-base": {"vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0, "d_model": 768, "d_ff": 3072,
                "num_layers": 12, "num_heads": 12},
    "T5-3B": {**T5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "Llama-7B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                 "num_attention_heads": 32},
    "Llama-1B": {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                 "num_attention_heads": 32, "num_key_value_heads": 4},
}  # fmt: skip
LESS = ["--bf16=true", "--gradient_checkpointing=true"]
# Job, recipe, teacher, student, settings beyond the recipe.
ROWS = [
    ("seqkd", "seqkd_t0_to_t5", "T0-3B", "T5-base", []),
    ("ppo", "ppo_t0_to_t5", "T0-3B", "T5-base", []),
    ("ppo", "ppo_t0_to_t5", "T0-11B", "T5-base", []),
    ("ppo", "ppo_t0_to_t5", "T0-11B", "T5-3B", LESS),
    ("seqkd", "seqkd_smollm2", "Llama-7B", "Llama-1B", ["--teacher_dtype=bfloat16", *LESS]),
    ("ppo", "ppo_smollm2", "Llama-7B", "Llama-1B", ["--teacher_dtype=bfloat16", *LESS]),
    ("ppo", "ppo_smollm2", "Llama-7B", "Llama-7B",
     ["--teacher_dtype=bfloat16", "--dtype=bfloat16", "--use_peft=true", *LESS]),
]  # fmt: skip
SHOWN = ("teacher", "student", "reference policy", "gradients", "optimizer state", "teacher's prompt cache, at most")


def config_of(shape: str, *, once: bool) -> Any:
    from transformers import LlamaConfig, T5Config

    sizes = SHAPES[shape] | ({"num_layers": 1, "num_hidden_layers": 1} if once else {})
    return (LlamaConfig if "hidden_size" in sizes else T5Config)(**sizes)


def estimate_of(row: tuple[str, str, str, str, list[str]], folder: Path, *, once: bool) -> Any:
    from rlkd.jobs.estimate import estimate
    from rlkd.jobs.training import TRAINING_JOBS
    from rlkd.settings.parsing import parse_config

    name, recipe, teacher, student, flags = row
    for shape in (teacher, student):
        config_of(shape, once=once).save_pretrained(folder / shape)
    job = TRAINING_JOBS[name]
    argv = ["--config", f"recipes/{recipe}.yaml", "--teacher", str(folder / teacher), *flags]
    argv += ["--model_name_or_path", str(folder / student), "--output_dir", str(folder / "out"), "--report_to=none"]
    if "--bf16=true" in flags or "t0" in recipe:
        argv.append("--use_cpu=true")  # this machine has no GPU, and bfloat16 is counted all the same
    return estimate(name, parse_config(job.settings, argv, preset=job.preset), rows=12_460)


def main() -> None:
    args = arguments(__doc__).parse_args()
    columns = " | ".join((*SHOWN, "all else at the peak"))
    print(f"| job | teacher -> student | {columns} | together, GB | 10^12 operations an update | hours |")
    print("|---|---|" + "---|" * (len(SHOWN) + 4))
    figures = {}
    for row in ROWS[1:2] if args.once else ROWS:
        with tempfile.TemporaryDirectory() as folder:
            found = estimate_of(row, Path(folder), once=args.once)
        parts = [found.peak.parts.get(name, 0) for name in SHOWN]
        parts.append(found.peak.total - sum(parts))
        job, _, teacher, student, flags = row
        more = " (LoRA)" if "--use_peft=true" in flags else ""
        hours = found.hours(found.operations / (TFLOPS * 1e12))
        cells = [f"{size / 1e9:,.1f}" for size in (*parts, found.peak.total)]
        cells += [f"{found.operations / 1e12:,.0f}", f"{hours:,.1f}"]
        print(f"| {job} | {teacher} -> {student}{more} | {' | '.join(cells)} |", flush=True)
        figures[f"{job}_{teacher}_{student}_gb"] = found.peak.total / 1e9
    report(figures)


if __name__ == "__main__":
    main()
