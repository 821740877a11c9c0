"""A server of language models with vLLM's OpenAI-compatible API, or SGLang's own: the client.

Requests name tokens by their ids, and every sampling setting, which servers otherwise fill in from the model's
generation_config. They run `concurrency` at a time; urllib3 repeats those that fail on the way.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError

from ..checks import Count, Positive, check_settings
from ..errors import ConfigError, DivergenceError, ModelError, ServerError, cut, listed
from ..io.redaction import redacted
from . import sglang
from .generation import AnswerRules

# The environment variable with the server's key: it is in no setting, file or message.
KEY = "RLKD_SERVER_KEY"
ATTEMPTS = 4
LATER = (408, 429, 502, 503, 504)  # statuses that a later attempt may not meet
CONNECT_SECONDS = 10.0
# Neither temperature nor a filter or penalty, so that log-probabilities are the model's own.
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
         "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
APIS = {"vllm": "vLLM's API (0.10.2 or newer)", "sglang": "SGLang's API"}
NO_PROBABILITY = -9999.0  # what vLLM writes for log 0

Choice = dict[str, Any]
Api = Literal["vllm", "sglang"]


@dataclass(frozen=True)
class ServerSettings:
    """Where a model is served, and how it is asked.

    url          of the API, such as http://localhost:8000/v1
    api          whose it is: vllm, or sglang
    model        its name there; None: the only one that is served
    concurrency  requests at a time
    timeout      seconds that one request may take
    The key, if the server wants one, is in the environment (`RLKD_SERVER_KEY`). Raises ConfigError for a url that is
    none, or that holds a key.
    """

    url: str
    model: str | None = None
    concurrency: Count = 8
    timeout: Positive = 60.0
    api: Api = "vllm"

    def __post_init__(self) -> None:
        check_settings(self)
        try:
            parts = urllib3.util.parse_url(self.url)
        except HTTPError:
            parts = urllib3.util.Url()
        if parts.auth or parts.query:
            raise ConfigError(f"server_url: a key does not belong in it, where it would be recorded: set {KEY}")
        if parts.scheme not in ("http", "https") or not parts.host or parts.fragment:
            raise ConfigError(f"server_url = {cut(self.url)!r}: must be a URL such as http://localhost:8000/v1")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a server tells of one token: its log-probability, and the best tokens with theirs, best first."""

    chosen: float
    best: list[tuple[int, float]]


def layout(prompt: list[int], answer: list[int]) -> tuple[list[int], slice]:
    """Prompt and answer as the one sequence that a decoder-only model reads, and the places of the answer's tokens:
    entry t of `prompt_logprobs` is the distribution of token t after those before it.
    """
    return [*prompt, *answer], slice(len(prompt), len(prompt) + len(answer))


class Server:
    """A client of a server; nothing is asked before the first call.

    Args: settings; valid_vocab, the ids that are tokens; tokenizer, to compare the server's tokens with, if given.
    Its methods raise ServerError if the server is down, too slow or failing, ConfigError if it refuses the key, and
    ModelError if it serves another model, refuses a request or answers without what was asked for.
    """

    def __init__(self, settings: ServerSettings, valid_vocab: int, tokenizer: Any = None):
        self.settings, self.valid_vocab, self.tokenizer = settings, valid_vocab, tokenizer
        # SGLang's own paths are beside those of OpenAI's API.
        self.url = settings.url.rstrip("/").removesuffix("/v1" if settings.api == "sglang" else "")
        retries = urllib3.Retry(
            ATTEMPTS - 1,
            allowed_methods=None,  # asking twice changes nothing
            status_forcelist=LATER,
            raise_on_status=False,
            respect_retry_after_header=False,  # which may name hours
            backoff_factor=0.5,
            backoff_jitter=0.5,
        )
        self._http = urllib3.PoolManager(
            maxsize=settings.concurrency,
            block=True,
            retries=retries,
            timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, settings.timeout), read=settings.timeout),
        )
        self._threads = ThreadPoolExecutor(settings.concurrency, "server")
        self._compared = tokenizer is None

    @cached_property
    def served(self) -> dict[str, Any]:
        """The server's description of the model: its id there, and what else it tells. Raises ModelError if it does not
        serve it.
        """
        wanted = self.settings.model
        try:
            path = "v1/models" if self.settings.api == "sglang" else "models"
            models = self._listed(self._ask("GET", path), "data")
        except ModelError:
            if wanted is None:
                raise
            return {"id": wanted}  # a server without a list refuses a wrong name later
        names = [str(model.get("id")) for model in models]
        if wanted is None and len(models) == 1:
            return models[0]
        for model, name in zip(models, names, strict=True):
            if name == wanted:
                return model
        problem = "name one of its models" if wanted is None else f"it does not serve '{wanted}'"
        raise ModelError(f"server {self.url}: {problem} (server_model): it serves {listed(names) or 'none'}.")

    @property
    def model(self) -> str:
        """The model's name there. Raises as `served`."""
        return str(self.served["id"])

    def check_window(self, prompt: int, answer: int) -> None:
        """Raises ConfigError if the model there cannot read a prompt and an answer of so many tokens."""
        window = self.served.get("max_model_len")
        # A request that scores makes one token more.
        if isinstance(window, int) and prompt + answer + 1 > window:
            raise ConfigError(
                f"max_input_tokens = {prompt} and max_new_tokens = {answer}: the model on the server reads {window} "
                "tokens, and scoring takes one more: lower one of them."
            )

    def score(self, prompts: list[list[int]], answers: list[list[int]], k: int = 1) -> list[list[TokenScores]]:
        """Each token of each answer to its prompt, scored by the model: its log-probability and the k best tokens.

        Also raises DivergenceError if a log-probability is not finite.
        """
        rows = [layout(*pair) for pair in zip(prompts, answers, strict=True)]
        wanted = [i for i, answer in enumerate(answers) if answer]
        choices = self._complete([rows[i][0] for i in wanted], {**PLAIN, "max_tokens": 1, "prompt_logprobs": k})
        scores: list[list[TokenScores]] = [[] for _ in rows]
        for i, choice in zip(wanted, choices, strict=True):
            sequence, places = rows[i]
            entries = self._entries(choice, sequence)
            self._compare(entries[1:], sequence[1:])
            scores[i] = [self._token(*pair, k) for pair in zip(entries[places], sequence[places], strict=True)]
        return scores

    def generate(
        self, prompts: list[list[int]], rules: AnswerRules, max_new_tokens: int, *, temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """The tokens of an answer to each prompt, end-of-sequence included; greedy without seeds."""
        settings = {**PLAIN, "temperature": temperature, "max_tokens": max_new_tokens, "return_token_ids": True,
                    "stop_token_ids": list(rules.eos_ids)}  # fmt: skip
        if seeds is None:
            choices = self._complete(prompts, settings)
        else:
            # A seed is of a request.
            pairs = zip(prompts, seeds, strict=True)
            bodies = [{**settings, "model": self.model, "prompt": [p], "seed": seed} for p, seed in pairs]
            choices = [choice for made in self._all(bodies) for choice in made]
        return [self._answer(choice, rules) for choice in choices]

    # Requests

    def _complete(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[Choice]:
        """One choice for each prompt, in as many requests as run at a time."""
        if not prompts:
            return []
        size = math.ceil(len(prompts) / self.settings.concurrency)
        parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        made = self._all([{**settings, "model": self.model, "prompt": part} for part in parts])
        return [choice for part in made for choice in part]

    def _all(self, bodies: list[dict[str, Any]]) -> list[list[Choice]]:
        return list(self._threads.map(self._choices, bodies))

    def _choices(self, body: dict[str, Any]) -> list[Choice]:
        """The choices of one request, in the order of its prompts."""
        if self.settings.api == "sglang":
            answer = self._ask("POST", sglang.PATH, sglang.request_of(body))
            try:
                choices = sglang.choices_of(answer)
            except (AttributeError, KeyError, TypeError, ValueError):
                raise self._unlike(f"its answer is {cut(repr(answer))}") from None
        else:
            choices = self._listed(self._ask("POST", "completions", body), "choices")
        if len(choices) != len(body["prompt"]):
            raise ModelError(f"server {self.url}: {len(choices)} answers to {len(body['prompt'])} prompts.")
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers in JSON."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            data = None if body is None else json.dumps(body).encode()
            response = self._http.request(method, f"{self.url}/{path}", body=data, headers=headers, redirect=False)
        except HTTPError as error:
            raise ServerError(f"server {self.url}: {self._why(error)}") from error
        if response.status != 200:
            raise self._refusal(response.status, response.data.decode(errors="replace"))
        try:
            answer = json.loads(response.data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict | list):
            raise self._unlike("it does not answer in JSON")
        return answer

    def _why(self, error: HTTPError) -> str:
        reason = error.reason if isinstance(error, MaxRetryError) else error
        if isinstance(reason, ReadTimeoutError):
            return (
                f"no answer within {self.settings.timeout:g} s, in {ATTEMPTS} attempts: raise server_timeout, or lower "
                "server_concurrency."
            )
        return (
            f"it cannot be reached ({type(reason).__name__}, {ATTEMPTS} attempts). Is it running, and server_url right?"
        )

    def _refusal(self, status: int, text: str) -> Exception:
        """The error of an answer other than 200, in the server's words."""
        said = cut(redacted(" ".join(text.split())), 200).rstrip(".")
        if status in (401, 403):
            return ConfigError(f"server {self.url}: it refuses the key ({status}): set {KEY} in the environment.")
        if status in LATER or status >= 500:
            return ServerError(f"server {self.url}: it fails ({status}): {said}.")
        return ModelError(f"server {self.url}: it refuses the request ({status}): {said}.")

    # Answers

    def _listed(self, answer: Any, name: str) -> list[dict[str, Any]]:
        value = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._unlike("its answer has no list of models or choices")
        return value

    def _unlike(self, problem: str) -> ModelError:
        return ModelError(f"server {self.url}: {problem}: it takes a server with {APIS[self.settings.api]}.")

    def _entries(self, choice: Choice, sequence: list[int]) -> list[Any]:
        """`prompt_logprobs`, one entry for each token of the sequence."""
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list):
            raise self._unlike("no prompt_logprobs in its answer")
        if len(entries) != len(sequence):
            raise ModelError(
                f"server {self.url}: it read {len(entries)} of {len(sequence)} tokens, so it cuts prompts: lower "
                "max_input_tokens, or serve the model with a longer context window (--max-model-len)."
            )
        return entries

    def _token(self, entry: Any, token: int, k: int) -> TokenScores:
        """The scores of one token, from its entry of `prompt_logprobs`."""
        try:
            found = {int(i): value for i, value in entry.items()}
            logps = {i: float(value["logprob"]) for i, value in found.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self._unlike(f"an entry of its prompt_logprobs is {cut(repr(entry))}") from None
        if token not in found:
            raise self._unlike(f"no log-probability of token {token}, which was sent")
        if any(not math.isfinite(logp) or logp <= NO_PROBABILITY for logp in logps.values()):
            raise DivergenceError(f"server {self.url}: a log-probability is not finite: {cut(str(logps))}.")
        if max(logps.values()) > 1e-4:
            raise ModelError(
                f"server {self.url}: {max(logps.values()):.3g} is not a log-probability: serve the model with "
                "--logprobs-mode raw_logprobs."
            )
        best = sorted(logps.items(), key=lambda pair: (-pair[1], found[pair[0]].get("rank") or 0))[:k]
        # One entry may be the given token alone, which need not be the best.
        if len(best) < k or found[best[0][0]].get("rank", 1 if len(found) > 1 else None) != 1:
            raise ModelError(
                f"server {self.url}: too few log-probabilities for a token, {len(best)} of {k} (the best must be among "
                f"them): serve the model with --max-logprobs {k} or more."
            )
        self._check_known(i for i, _ in best)
        return TokenScores(logps[token], best)

    def _answer(self, choice: Choice, rules: AnswerRules) -> list[int]:
        """The token ids of a choice."""
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list):
            raise self._unlike("no token_ids in its answer")
        if reason not in ("stop", "length"):
            raise ServerError(f"server {self.url}: an answer ended by {reason!r}.")
        self._check_known(ids)
        ended = reason == "length" or (ids[-1:] != [] and ids[-1] in rules.eos_ids)
        return ids if ended else [*ids, rules.eos_ids[0]]

    def _check_known(self, ids: Any) -> None:
        if unknown := [i for i in ids if i >= self.valid_vocab]:
            raise self._other_vocabulary(f"it writes token {unknown[0]}, and the tokenizer has {self.valid_vocab} ids")

    def _compare(self, entries: list[Any], ids: list[int]) -> None:
        """Raise ModelError if the texts of the server's tokens are not the tokenizer's; of the first answer only."""
        if self._compared:
            return
        self._compared = True
        given = [_text_of(*pair) for pair in zip(ids, entries, strict=True)]
        pairs = [(text.strip(), self.tokenizer.decode([i]).strip()) for i, text in zip(ids, given, strict=True) if text]
        whole = [(a, b) for a, b in pairs if "\ufffd" not in a + b]  # parts of a character have no text of their own
        other = [pair for pair in whole if pair[0] != pair[1]]
        if 2 * len(other) > len(whole):
            raise self._other_vocabulary(f"a token is {other[0][0]!r} there and {other[0][1]!r} here")

    def _other_vocabulary(self, how: str) -> ModelError:
        return ModelError(
            f"server {self.url}: its model '{self.model}' has another vocabulary than the teacher's tokenizer ({how}): "
            "name the model that is served as teacher, or serve the teacher."
        )


def _text_of(token: int, entry: Any) -> str | None:
    """What an entry of `prompt_logprobs` says the token is, if it does."""
    value = entry.get(str(token)) if isinstance(entry, dict) else None
    return value.get("decoded_token") if isinstance(value, dict) else None
