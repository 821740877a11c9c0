"""SGLang's own API (`/generate`) in the terms of vLLM's, in which `server.py` asks and reads."""

from __future__ import annotations

from typing import Any

PATH = "generate"
SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "stop_token_ids")  # fmt: skip


def request_of(body: dict[str, Any]) -> dict[str, Any]:
    """A request for completions as SGLang takes it. Its server has one model, and samples without a seed."""
    sampling = {name: body[name] for name in SAME if name in body} | {"max_new_tokens": body["max_tokens"]}
    request: dict[str, Any] = {"input_ids": body["prompt"], "sampling_params": sampling}
    if k := body.get("prompt_logprobs"):
        request |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k}
        request["return_text_in_logprobs"] = True
    return request


def choices_of(answer: Any) -> list[dict[str, Any]]:
    """The choices of an answer. Raises KeyError, TypeError or ValueError if it is not SGLang's."""
    return [_choice(made) for made in (answer if isinstance(answer, list) else [answer])]


def _choice(made: dict[str, Any]) -> dict[str, Any]:
    meta = made["meta_info"]
    choice = {"token_ids": made.get("output_ids"), "finish_reason": (meta.get("finish_reason") or {}).get("type")}
    if "input_token_logprobs" in meta:
        pairs = zip(meta["input_token_logprobs"], meta["input_top_logprobs"], strict=True)
        choice["prompt_logprobs"] = [_entry(own, best or []) for own, best in pairs]
    return choice


def _entry(own: list[Any], best: list[list[Any]]) -> dict[str, Any] | None:
    """An entry of vLLM's `prompt_logprobs` from [log-probability, id, text] of the given and of the best tokens."""
    if own[0] is None:  # nothing comes before the first token
        return None
    ranked = [(own, None), *((token, rank) for rank, token in enumerate(best, 1))]
    return {
        str(token): {"logprob": logprob, "rank": rank, "decoded_token": text} for (logprob, token, text), rank in ranked
    }
