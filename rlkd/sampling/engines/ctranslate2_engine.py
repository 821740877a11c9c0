"""CTranslate2: teachers of the T5 and BART families in float32, bfloat16 or int8, on a CPU or a GPU.

The teacher is converted once per weights and precision, into a cache folder. Sampling is done in PyTorch: CTranslate2
seeds its generators once per thread, so samples depend on the batch and on earlier calls.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, RlkdError
from ...io.files import sha256
from ...models import conversion
from ...models.conversion import TRANSLATORS, specification
from ...models.digests import configuration_digest, weights_digest
from ...models.encoder_decoder import positions
from ...models.generation import rules_of
from ...models.language_model import LanguageModel
from ...models.spec import LoadedModel, ModelSource
from .protocol import Answer, Decoding, EngineSettings

logger = logging.getLogger(__name__)

CHECKSUMS = "sha256.json"


class CTranslate2Engine:
    """Greedy and beam search by CTranslate2. Beam search stops once `num_beams` hypotheses are finished, where
    transformers continues while a better one could follow; the rest, log-probabilities included, agrees with PyTorch.

    The PyTorch weights are read for conversion and for their digest, and are not kept.
    Args: compute_type, precision; threads per forward, 0 for one per core; device, by default that of `lm`.
    Raises ConfigError if CTranslate2 cannot take the model or the precision.
    """

    name = "ctranslate2"

    def __init__(
        self, lm: LanguageModel, compute_type: str = "float32", *, threads: int = 0, device: str | None = None
    ):
        where = torch.device(device or lm.device)
        if reason := conversion.objection(LoadedModel(lm), compute_type, where, TRANSLATORS):
            raise ConfigError(f"engine = 'ctranslate2': {reason} Use --engine torch.")
        import ctranslate2

        self.exact = compute_type == LoadedModel(lm).dtype
        self._rules, self._positions = rules_of(lm), lm.positions
        self._identity = {
            "teacher": lm.model.name_or_path,
            "teacher_weights": weights_digest(lm.model),
            "teacher_configuration": configuration_digest(lm.model),
            "dtype": compute_type,
            "ctranslate2": ctranslate2.__version__,
            **self._rules.identity(),
        }
        self._translator = ctranslate2.Translator(
            str(convert(lm, compute_type)),
            device=where.type,
            device_index=where.index or 0,
            compute_type=compute_type,
            intra_threads=threads,
        )

    @staticmethod
    def objection(model: ModelSource, decoding: Decoding | None, settings: EngineSettings) -> str | None:
        precision = settings.compute_type or model.dtype
        where = torch.device(model.device or "cpu")
        reason = conversion.objection(model, precision, where, TRANSLATORS)
        return reason or _unable(decoding, positions(model.config).answer)

    @staticmethod
    def reservation(decoding: Decoding | None) -> str | None:
        if decoding is None:
            return "every answer choice would encode its prompt again."
        if decoding.strategy == "beam":
            return "beam search stops earlier than transformers' does, so that some answers differ."
        return None

    @classmethod
    def of(cls, model: ModelSource, settings: EngineSettings) -> CTranslate2Engine:
        # Weights that are only converted need no accelerator memory.
        lm, precision = model.language_model("cpu"), settings.compute_type or model.dtype
        engine = cls(lm, precision, threads=settings.threads, device=model.device)
        del lm
        gc.collect()  # modules refer to each other
        return engine

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def answer(self, prompts: list[list[int]], seeds: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        """As `Engine.answer`, for greedy and beam. Raises ConfigError for other strategies, RlkdError if CTranslate2
        gives no answer to a prompt.
        """
        if reason := _unable(decoding, self._positions.answer):
            raise ConfigError(f"engine = 'ctranslate2': {reason} Use --engine torch.")
        if decoding.strategy == "beam":
            return self._beam(prompts, decoding)
        logps: list[list[float]] = [[] for _ in prompts]

        def record(token: Any) -> bool:
            logps[token.batch_id].append(token.log_prob)
            return False

        rows = self._translate(prompts, decoding, beam_size=1, callback=record)
        flat = [ids for (ids,) in rows]
        return [[self._answer(*parts, decoding)] for parts in zip(flat, self._certain(flat, logps), strict=True)]

    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        """As Engine.score; every answer encodes its prompt."""
        # CTranslate2 scores an end after what it is given, at a position of its own.
        self._check_lengths(prompts, 1 + max(map(len, answers), default=0))
        results = self._translator.score_batch(_tokens(prompts), _tokens(answers), max_input_length=0)
        _check([result.log_probs for result in results])
        logps = [result.log_probs[: len(answer)] for result, answer in zip(results, answers, strict=True)]
        return self._certain(answers, logps)

    def _check_lengths(self, prompts: list[list[int]], longest_answer: int) -> None:
        self._positions.check(max(map(len, prompts), default=0), longest_answer)

    def _certain(self, answers: list[list[int]], logps: list[list[float]]) -> list[list[float]]:
        """The log-probabilities of answers, of which a forced first token has 0."""
        first = self._rules.first
        if first is None:
            return logps
        pairs = zip(answers, logps, strict=True)
        return [[0.0, *row[1:]] if answer[:1] == [first] else row for answer, row in pairs]

    def _beam(self, prompts: list[list[int]], decoding: Decoding) -> list[list[Answer]]:
        n = decoding.labels_per_input
        rows = self._translate(prompts, decoding, beam_size=decoding.num_beams, num_hypotheses=n)
        flat = [ids for row in rows for ids in row]
        logps = self.score([prompt for prompt in prompts for _ in range(n)], flat)
        answers = [self._answer(*parts, decoding) for parts in zip(flat, logps, strict=True)]
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    def _translate(self, prompts: list[list[int]], decoding: Decoding, **options: Any) -> list[list[list[int]]]:
        rules = self._rules
        self._check_lengths(prompts, decoding.max_new_tokens)
        results = self._translator.translate_batch(
            _tokens(prompts),
            target_prefix=None if rules.first is None else _tokens([[rules.first]] * len(prompts)),
            # An end that is forced at the limit is written below.
            max_decoding_length=decoding.max_new_tokens - (rules.last is not None),
            length_penalty=rules.length_penalty,
            end_token=list(map(str, rules.eos_ids)),
            # By default it truncates prompts and forbids empty answers.
            max_input_length=0,
            min_decoding_length=0,
            return_end_token=True,
            return_scores=True,
            **options,
        )
        rows = [[list(map(int, tokens)) for tokens in result.hypotheses] for result in results]
        # Even an empty answer has an end-of-sequence.
        _check([row if all(row) else [] for row in rows])
        return rows

    def _answer(self, ids: list[int], logps: list[float], decoding: Decoding) -> Answer:
        rules = self._rules
        finished = rules.ended(ids, decoding.max_new_tokens)
        if finished or rules.last is None:
            return Answer(ids, logps, finished)
        return Answer([*ids, rules.last], [*logps, 0.0], finished)


def _unable(decoding: Decoding | None, limit: int | None) -> str | None:
    """Why CTranslate2 cannot decode this way, with a model of `limit` positions."""
    if decoding is not None and decoding.strategy == "beam" and limit is not None and decoding.max_new_tokens >= limit:
        return f"it scores answers of less than {limit} tokens, the teacher's positions."
    if decoding is not None and decoding.strategy == "sample":
        return "its samples are not reproducible: they depend on the batch, not on a row's seed."
    if decoding is not None and decoding.top_k_logprobs:
        return "it does not return the log-probabilities of other tokens (top_k_logprobs)."
    return None


def convert(lm: LanguageModel, compute_type: str) -> Path:
    """The folder of the converted teacher: `ctranslate2/<hash of the weights, precision and version>` below $RLKD_CACHE
    or ~/.cache/rlkd. It is written under a temporary name, then renamed, so that it is complete or absent; one whose
    files have changed since is converted again.
    """
    spec = _specification(lm)
    folder = _cache() / "ctranslate2" / _digest(spec, compute_type)
    if folder.is_dir():
        if _checksums(folder) == _recorded(folder):
            return folder
        logger.warning("the converted teacher in %s is damaged: converting it again", folder)
        shutil.rmtree(folder)
    logger.info("converting the teacher for CTranslate2 (%s): %s", compute_type, folder)
    spec.optimize(quantization=compute_type)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        spec.save(str(temporary))
        (temporary / CHECKSUMS).write_text(json.dumps(_checksums(temporary), indent=2), encoding="utf-8")
        os.rename(temporary, folder)
    except OSError:
        # Another process may have been faster.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _checksums(folder: Path) -> dict[str, str]:
    """Name -> sha256 of the files that CTranslate2 reads."""
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != CHECKSUMS}


def _recorded(folder: Path) -> Any:
    try:
        return json.loads((folder / CHECKSUMS).read_bytes())
    except (OSError, ValueError):
        return None


def _specification(lm: LanguageModel) -> Any:
    """CTranslate2's description of the model. Its tokens are the ids as decimal text."""
    spec = specification(lm, [str(i) for i in range(lm.valid_vocab)])
    # It answers nothing to a prompt of these two alone, such as an empty text's end-of-sequence. Answers end with
    # `end_token` instead.
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(rules_of(lm).pad_id)
    spec.validate()
    return spec


def _digest(spec: Any, compute_type: str) -> str:
    import ctranslate2

    settings = [ctranslate2.__version__, compute_type, spec.config.to_dict()]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in spec.variables(ordered=True):
        digest.update(f"{name}{value.shape}{value.dtype}".encode())
        digest.update(value.to_bytes())
    return digest.hexdigest()[:32]


def _cache() -> Path:
    return Path(os.environ.get("RLKD_CACHE") or Path.home() / ".cache" / "rlkd")


def _tokens(rows: list[list[int]]) -> list[list[str]]:
    return [list(map(str, row)) for row in rows]


def _check(results: list[Any]) -> None:
    """CTranslate2 reports a failed row as an empty one, without an exception."""
    if failed := [i for i, result in enumerate(results) if not result]:
        raise RlkdError(
            f"CTranslate2 returned no answer for {len(failed)} of {len(results)} prompts of a batch: rows "
            f"{', '.join(map(str, failed[:10]))}. Use --engine torch, which reports the cause."
        )
