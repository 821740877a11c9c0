"""A language model as a folder that CTranslate2 serves without rlkd: written, called, and checked against PyTorch.

Unlike the label engine's conversions it has the tokenizer's own tokens and real ends, so that any program that knows
CTranslate2 can call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ModelError
from ..models.conversion import specification
from ..models.generation import AnswerRules, rules_of
from ..models.language_model import LanguageModel
from .engines.protocol import Answer
from .schedule import Budget, in_batches

MODEL_FILE = "model.bin"
TOLERANCE = 0.01  # nats a token: rounding gives 1e-5, a layer that is computed otherwise gives whole nats
CHECKED = 16


def write_exported(
    lm: LanguageModel, tokenizer: Any, folder: Path, quantization: str, prompts: list[list[int]], answers: list[Answer]
) -> Exported:
    """Convert `lm` into `folder`; its PyTorch form may be used no more. The float32 conversion has to give the
    log-probabilities of PyTorch's `answers` to `prompts`, or nothing can be said of a rounded one.

    Raises ModelError if it does not, or if the converter cannot read the model.
    """
    names, rules = token_names(tokenizer, lm.valid_vocab), rules_of(lm)
    try:
        spec = specification(lm, names)
    except Exception as error:  # whatever the converter stumbles over
        raise ModelError(
            f"student '{lm.model.name_or_path}': CTranslate2 cannot convert this '{lm.model.config.model_type}' model "
            f"({type(error).__name__}: {error})."
        ) from error
    spec.config.bos_token = tokenizer.bos_token or names[rules.pad_id]
    spec.config.eos_token = names[rules.eos_ids[0]]
    spec.config.unk_token = tokenizer.unk_token or names[rules.pad_id]
    spec.validate()
    with TemporaryDirectory(dir=folder) as full:
        spec.save(full)
        _check(Exported(Path(full), names, rules), prompts[:CHECKED], answers[:CHECKED], lm.model.name_or_path)
    spec.optimize(quantization=quantization)
    spec.save(str(folder))
    tokenizer.save_pretrained(folder)
    return Exported(folder, names, rules)


def token_names(tokenizer: Any, size: int) -> list[str]:
    """A name of its own for each of the ids 0 .. size - 1: the tokenizer's, where it has one."""
    names: dict[str, int] = {}
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(size)))):
        names[f"<id {i}>" if token is None or token in names else token] = i
    return list(names)


@dataclass(frozen=True)
class Exported:
    """A folder that CTranslate2 serves, with the names of its tokens and the rules of its answers."""

    folder: Path
    names: list[str]
    rules: AnswerRules

    @property
    def continues(self) -> bool:
        """Whether answers continue their prompts."""
        return self.rules.start_id is None

    @property
    def megabytes(self) -> float:
        """Size of the weights in units of 10^6 bytes."""
        return (self.folder / MODEL_FILE).stat().st_size / 1e6

    @property
    def prefix(self) -> list[str]:
        """Tokens that every answer is made to begin with."""
        return [] if self.rules.first is None else [self.names[self.rules.first]]

    def options(self, max_new_tokens: int) -> dict[str, Any]:
        """What `generate_batch` or `translate_batch` has to be told for the answers of greedy decoding."""
        ends = [self.names[token] for token in self.rules.eos_ids]
        # An end may be a word of the text.
        more: dict[str, Any] = {"end_token": ends, "return_end_token": True} if len(ends) > 1 else {}
        if self.continues:
            return {"beam_size": 1, "max_length": max_new_tokens, "include_prompt_in_result": False, **more}
        # An end that is forced at the limit takes the place of a token.
        longest = max_new_tokens - (self.rules.last is not None)
        # By default it cuts prompts, and forbids empty answers.
        lengths = {"max_input_length": 0, "min_decoding_length": 0, "max_decoding_length": longest}
        return {"beam_size": 1, **lengths, **more}

    def load(self, threads: int = 1) -> Any:
        """CTranslate2's `Generator` or `Translator` on the CPU."""
        import ctranslate2

        kind = ctranslate2.Generator if self.continues else ctranslate2.Translator
        return kind(str(self.folder), intra_threads=threads)

    def answer(self, model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The greedy answer to each prompt, without its end, by what `load` gave."""
        ids = {name: i for i, name in enumerate(self.names)}
        answers: list[list[int]] = [[] for _ in prompts]
        options = self.options(max_new_tokens)

        def run(rows: list[int]) -> None:
            texts = [self._named(prompts[i]) for i in rows]
            if self.continues:
                found = [result.sequences[0] for result in model.generate_batch(texts, **options)]
            else:
                prefix = [self.prefix] * len(rows) if self.prefix else None
                results = model.translate_batch(texts, target_prefix=prefix, **options)
                found = [result.hypotheses[0] for result in results]
            for i, tokens in zip(rows, found, strict=True):
                answers[i] = without_end([ids[token] for token in tokens], self.rules)

        in_batches(run, [len(prompt) for prompt in prompts], [max_new_tokens] * len(prompts), Budget())
        return answers

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        """Natural log-probability of each token of the given answers."""
        model, targets = self.load(), [self._named(answer) for answer in answers]
        texts = [self._named(prompt) for prompt in prompts]
        if self.continues:
            scored = model.score_batch([text + target for text, target in zip(texts, targets, strict=True)])
            return [row.log_probs[-len(answer) :] for row, answer in zip(scored, answers, strict=True)]
        scored = model.score_batch(texts, targets, max_input_length=0)
        return [row.log_probs[: len(answer)] for row, answer in zip(scored, answers, strict=True)]

    def _named(self, ids: list[int]) -> list[str]:
        return [self.names[i] for i in ids]


def _check(exported: Exported, prompts: list[list[int]], answers: list[Answer], name: str) -> None:
    """Raise ModelError unless the conversion gives these answers' log-probabilities, which are 0 of forced tokens."""
    scored = exported.score(prompts, [answer.ids for answer in answers])
    theirs = chain.from_iterable(answer.logps for answer in answers)
    off = max((abs(a - b) for a, b in zip(theirs, chain.from_iterable(scored), strict=True) if a != 0.0), default=0.0)
    if not off <= TOLERANCE:
        raise ModelError(
            f"student '{name}': CTranslate2's float32 form differs from PyTorch by {off:.2g} nats in a token's "
            "log-probability: something in this model's configuration is not converted. Nothing was written."
        )


def without_end(ids: list[int], rules: AnswerRules) -> list[int]:
    """An answer without the token that ended it, if one did."""
    return ids[:-1] if ids and ids[-1] in rules.eos_ids else ids


def equal_shares(ours: list[list[int]], theirs: list[list[int]]) -> tuple[float, float]:
    """Shares of equal answers, and of equal tokens: places at which both have the same one, of those of the longer."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    pairs = list(zip(ours, theirs, strict=True))
    places = sum(max(len(a), len(b)) for a, b in pairs)
    equal = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    return same / len(pairs), equal / places if places else 1.0
