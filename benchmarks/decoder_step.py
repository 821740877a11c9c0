"""An update of PPO on a decoder-only student, against one of TRL's GRPOTrainer with the same teacher's reward.

    python benchmarks/decoder_step.py --quick

The same student, teacher, prompts, and numbers of rollouts and tokens on both sides, each of which is sampled once and
learned from twice. An update is everything between two optimizer steps and the step itself: sampling, the teacher's
scores, the reference policy, loss, gradient and AdamW. The two take turns.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import torch
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from common import arguments, interleave, repetitions, report, show
from rlkd import Example, PPOArguments, PPOTrainer, teacher_reward_func
from rlkd.models.architectures import language_model
from rlkd.models.teacher import Teacher

VOCABULARY, PROMPT, ANSWER, EOS = 16_384, 128, 32, 1
PROMPTS, ROLLOUTS, TWICE = 4, 4, 2  # 16 rollouts, two updates on them
STUDENT = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
TEACHER = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
KL, TEMPERATURE = 0.05, 1.0


def model_of(shape: dict[str, int], seed: int) -> LlamaForCausalLM:
    """A random Llama that hardly ever ends an answer, so that all answers are as long."""
    torch.manual_seed(seed)
    ids = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(
        LlamaConfig(max_position_embeddings=256, num_key_value_heads=2, tie_word_embeddings=False, **shape, **ids)
    )
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0.0
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def teacher_of(seed: int, words: Any) -> Teacher:
    return Teacher(language_model(model_of(TEACHER, seed + 1), words), words, max_input_tokens=PROMPT)


class Ours:
    """PPO, one rollout batch a turn; options, settings other than the default."""

    def __init__(self, folder: str, texts: list[str], seed: int, **options: Any):
        words = tokenizer()
        settings = PPOArguments(
            str(Path(folder) / "ppo"), use_cpu=True, disable_tqdm=True, per_device_train_batch_size=PROMPTS * ROLLOUTS,
            rollouts_per_prompt=ROLLOUTS, max_input_tokens=PROMPT, max_new_tokens=ANSWER, learning_rate=1e-5,
            save_strategy="no", seed=seed, weak_start="ignore", epochs_per_rollout=TWICE, minibatches_per_rollout=1,
            kl_coef=KL, **options,
        )  # fmt: skip
        examples = [Example(str(i), text, (text,)) for i, text in enumerate(texts)]
        student = model_of(STUDENT, seed)
        self.trainer = PPOTrainer(
            student, settings, teacher=teacher_of(seed, words), tokenizer=words, train_examples=examples
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches: Iterator[Any] = self.trainer.experience()
        self.tokens = 0

    def turn(self) -> None:
        trainer, policy = self.trainer, self.trainer.policy
        for _ in range(TWICE):
            inputs = next(self.batches)
            self.tokens = int(inputs["minibatch"].answers.answer_mask.sum())
            policy.train()
            trainer.compute_loss(policy, inputs).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.state.global_step += 1


class Theirs:
    """TRL's GRPO with the teacher's return as its reward, likewise."""

    def __init__(self, folder: str, texts: list[str], seed: int):
        words = tokenizer()
        words.padding_side = "left"
        settings = trl.GRPOConfig(
            str(Path(folder) / "grpo"), use_cpu=True, disable_tqdm=True, bf16=False, report_to=[], save_strategy="no",
            per_device_train_batch_size=PROMPTS * ROLLOUTS, num_generations=ROLLOUTS, num_iterations=TWICE,
            steps_per_generation=1, max_completion_length=ANSWER, learning_rate=1e-5, beta=KL, temperature=TEMPERATURE,
            top_k=0, top_p=1.0, gradient_checkpointing=False, seed=seed, model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        start = str(Path(folder) / "student")  # which TRL reads anew as the reference policy
        model_of(STUDENT, seed).save_pretrained(start)
        self.trainer = trl.GRPOTrainer(
            start,
            reward_funcs=teacher_reward_func(teacher_of(seed, words), words),
            args=settings,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=words,
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = self.rows()
        self.tokens = 0

    def rows(self) -> Iterator[Any]:
        """Endless batches of prompts."""
        while True:
            yield from self.trainer.get_train_dataloader()

    def turn(self) -> None:
        trainer = self.trainer
        for _ in range(TWICE):
            trainer.model.train()
            trainer.training_step(trainer.model, next(self.batches), None)
            torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            trainer.state.global_step += 1
        self.tokens = int(trainer._buffered_inputs[0]["completion_mask"].sum())


def cache_speedup(seed: int, texts: list[str], turns: int) -> tuple[float, float]:
    """CPU seconds of scoring one rollout batch with an empty prompt cache, and with its prompts in it."""
    teacher = teacher_of(seed, tokenizer())
    inputs = [(text,) for text in texts for _ in range(ROLLOUTS)]
    answers = torch.randint(3, VOCABULARY, (len(inputs), ANSWER))
    mask = torch.ones_like(answers, dtype=torch.bool)

    def cold() -> None:
        teacher.cache = type(teacher.cache)(teacher.cache_bytes)
        teacher.score(inputs, answers, mask)

    seconds = interleave({"cold": cold, "warm": lambda: teacher.score(inputs, answers, mask)}, turns + 1)
    return seconds["cold"], seconds["warm"]


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    for shape in (STUDENT, TEACHER):
        shape["num_hidden_layers"] = 1 if args.once else shape["num_hidden_layers"]
    warnings.simplefilter("ignore", FutureWarning)  # TRL's use of transformers
    logging.set_verbosity_error()
    turns = repetitions(args, quick=3, full=9)
    random = torch.Generator().manual_seed(args.seed)
    rows = torch.randint(0, VOCABULARY - 3, (PROMPTS, PROMPT), generator=random).tolist()
    texts = [" ".join(f"w{i}" for i in row) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Ours(folder, texts, args.seed), Theirs(folder, texts, args.seed)
        lean = Ours(f"{folder}/lean", texts, args.seed, one_step="sampled", baseline="leave_one_out")
        sides = {"ppo": ours, "lean": lean, "grpo": theirs}
        for side in sides.values():  # loads kernels, and fills the teacher's cache on all sides
            side.turn()
        seconds = interleave({name: side.turn for name, side in sides.items()}, turns)
    for name, side in sides.items():
        if not 0.97 <= side.tokens / (PROMPTS * ROLLOUTS * ANSWER) <= 1.0:
            raise SystemExit(f"{name}: an update on {side.tokens} tokens: the times cannot be compared")
    cold, warm = cache_speedup(args.seed, texts, turns)
    named = {"ppo": "rlkd's PPO, as by default", "lean": "   without critic and exact term", "grpo": "TRL's GRPO"}
    show(
        f"An update on {PROMPTS * ROLLOUTS} answers of {ANSWER} tokens to {PROMPTS} prompts of {PROMPT}, "
        f"V {VOCABULARY:,}",
        ["side", "CPU s", "of GRPO's"],
        [[words, f"{seconds[name] / TWICE:.2f}", f"{seconds[name] / seconds['grpo']:.2f}"]
         for name, words in named.items()],
        f"Teacher's scores: {cold:.2f} CPU s, and {warm:.2f} with its prompts cached.",
    )  # fmt: skip
    report({
        "ppo_over_grpo": seconds["ppo"] / seconds["grpo"],
        "lean_ppo_over_grpo": seconds["lean"] / seconds["grpo"],
        "teacher_cache_speedup": cold / warm,
        "grpo_cpu_seconds": seconds["grpo"] / TWICE,
    })  # fmt: skip


if __name__ == "__main__":
    main()
