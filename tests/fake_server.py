"""A server of a tiny causal language model with the part of vLLM's API that rlkd asks, written from its documentation.

No vLLM runs in the tests: numbers come from transformers' own forward, without cache or padding.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

# (path, body, how many requests came before) -> (status, answer) instead of the server's own, or None.
Mishap = Callable[[str, Any, int], tuple[int, Any] | None]


class FakeServer:
    """Serves `model` under `name`. requests: (path, body, headers) of all that came; mishap: what goes wrong."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str = "tiny", window: int = 64, key: str | None = None):
        self.model, self.tokenizer, self.name, self.window, self.key = model, tokenizer, name, window, key
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.mishap: Mishap = lambda path, body, number: None
        self.most_logprobs = 20
        self.lock = threading.Lock()
        self.models = [{"id": name, "object": "model", "max_model_len": window}]
        self.url = ""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/generate":
            return self.as_sglang(body)
        if path.endswith("/models"):
            return 200, {"object": "list", "data": self.models}
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if max(body.get("prompt_logprobs") or 0, body.get("logprobs") or 0) > self.most_logprobs:
            return 400, {"error": {"message": f"Requested more than {self.most_logprobs} logprobs"}}
        for prompt in body["prompt"]:
            if len(prompt) + body["max_tokens"] > self.window:
                return 400, {"error": {"message": f"maximum context length is {self.window} tokens"}}
            if max(prompt) >= self.model.config.vocab_size:
                return 400, {"error": {"message": f"token id {max(prompt)} is out of vocabulary"}}
        with self.lock:
            choices = [{"index": i, **self.choice(prompt, body)} for i, prompt in enumerate(body["prompt"])]
        return 200, {"object": "text_completion", "choices": choices[::-1]}

    def as_sglang(self, body: dict[str, Any]) -> tuple[int, Any]:
        """SGLang's own API: lists of [log-probability, id, text], one of them for each prompt."""
        sampling, answers = body["sampling_params"], []
        for prompt in body["input_ids"]:
            k = body["top_logprobs_num"] if body.get("return_logprob") else None
            plain = {**sampling, "max_tokens": sampling["max_new_tokens"], "return_token_ids": True}
            with self.lock:
                made = self.choice(prompt, plain)
            meta: dict[str, Any] = {"finish_reason": {"type": made["finish_reason"]}, "prompt_tokens": len(prompt)}
            if k is not None:
                assert body["logprob_start_len"] == 0
                rows, text = self.logps(prompt), self.tokenizer.decode
                meta["input_token_logprobs"] = [[None, prompt[0], text(prompt[:1])]] + [
                    [rows[t - 1, i].item(), i, text([i])] for t, i in enumerate(prompt) if t
                ]
                meta["input_top_logprobs"] = [None] + [
                    [[x.item(), int(i), text([int(i)])] for x, i in zip(*row.topk(k), strict=True)] for row in rows[:-1]
                ]
            answers.append({"text": made["text"], "output_ids": made["token_ids"], "meta_info": meta})
        return 200, answers

    @torch.no_grad()
    def logps(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def choice(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        new: list[int] = []
        stop = {*body.get("stop_token_ids", ()), self.tokenizer.eos_token_id}
        random = torch.Generator().manual_seed(body.get("seed") or 0)
        while len(new) < body["max_tokens"] and not stop & set(new[-1:]):
            logits = self.logps([*prompt, *new])[-1]
            if body["temperature"] == 0:
                new.append(int(logits.argmax()))
            else:
                probs = (logits / body["temperature"]).softmax(-1)
                new.append(int(torch.multinomial(probs, 1, generator=random)))
        made: dict[str, Any] = {"text": self.tokenizer.decode(new, skip_special_tokens=True)}
        made["finish_reason"] = "stop" if new[-1] in stop else "length"
        if body.get("return_token_ids"):
            made["token_ids"] = new
        if (k := body.get("prompt_logprobs")) is not None:
            rows = self.logps(prompt)
            made["prompt_logprobs"] = [None, *(self.entry(rows[t - 1], prompt[t], k) for t in range(1, len(prompt)))]
        return made

    def entry(self, logps: torch.Tensor, token: int, k: int) -> dict[str, Any]:
        """The given token, and the k best."""
        best = logps.topk(k).indices.tolist()
        return {
            str(i): {
                "logprob": logps[i].item(),
                "rank": int((logps > logps[i]).sum()) + 1,
                "decoded_token": self.tokenizer.decode([i]),
            }
            for i in dict.fromkeys([token, *best])
        }


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """The server on a free port of this machine, with its url set."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open

        def respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            number = len(server.requests)
            server.requests.append((self.path, body, dict(self.headers)))
            made = server.mishap(self.path, body, number)
            if made is None and server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                made = 401, {"error": {"message": "Unauthorized"}}
            status, answer = made or server.answer(self.path, body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that has lost its patience
                self.wfile.write(data)

        do_GET = do_POST = respond  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
