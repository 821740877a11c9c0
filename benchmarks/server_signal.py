"""Scoring answers through a server against scoring them with the model itself: what the API costs.

    python benchmarks/server_signal.py --quick

The server is a process of this machine with the part of vLLM's API that `ServerTeacher` asks: it shows the cost of
requests, JSON and the log-probabilities of prompts, not the speed of vLLM. CPU seconds of one thread, those of client
and server together; the ways take turns, and their scores are compared. The server caches no prompt; the model itself
is timed without its cache and with it.
"""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from statistics import median
from threading import Lock, Thread
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common import arguments, cpu_seconds, repetitions, report, show
from rlkd.models.architectures import language_model
from rlkd.models.served import ServerTeacher
from rlkd.models.server import Server, ServerSettings
from rlkd.models.teacher import Teacher
from rlkd.objectives.rewards import induced_advantage

VOCABULARY, PROMPT, ANSWER, EOS = 8192, 16, 48, 1


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=320, intermediate_size=1280, num_hidden_layers=6, num_attention_heads=5,
        num_key_value_heads=5, max_position_embeddings=256, eos_token_id=EOS, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@torch.no_grad()
def choices_of(model: LlamaForCausalLM, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What vLLM answers with `prompt_logprobs` 1: of every token its own and the best log-probability."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    logps = model(input_ids=ids, attention_mask=ids > 0).logits[:, :-1].log_softmax(-1)
    own = logps.gather(-1, ids[:, 1:, None]).squeeze(-1).tolist()
    values, best = (x.tolist() for x in logps.max(-1))
    choices = []
    for i, prompt in enumerate(prompts):
        entries: list[Any] = [None]
        for t, token in enumerate(prompt[1:]):
            entry = {str(token): {"logprob": own[i][t], "rank": 2, "decoded_token": None}}
            entry[str(best[i][t])] = {"logprob": values[i][t], "rank": 1, "decoded_token": None}
            entries.append(entry)
        choices.append({"index": i, "text": "", "finish_reason": "length", "prompt_logprobs": entries})
    return choices


def serve(seed: int, pipe: Any) -> None:
    """Serve in this process until the pipe says stop; answers every message with the CPU seconds used so far."""
    torch.set_num_threads(1)
    model, lock = model_of(seed), Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.endswith("/models"):
                answer: dict[str, Any] = {"data": [{"id": "teacher", "max_model_len": 256}]}
            else:
                with lock:
                    answer = {"choices": choices_of(model, json.loads(body)["prompt"])}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = respond  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    Thread(target=http.serve_forever, daemon=True).start()
    pipe.send(http.server_address[1])
    while pipe.recv() != "stop":
        pipe.send(time.process_time())


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    rows, turns = (8 if args.once else 64), repetitions(args, quick=3, full=9)
    random = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(3, VOCABULARY, (rows, PROMPT + ANSWER), generator=random)
    texts = [(" ".join(f"w{i - 3}" for i in row[:PROMPT].tolist()),) for row in ids]
    answers, mask = ids[:, PROMPT:], torch.ones(rows, ANSWER, dtype=torch.bool)
    words = tokenizer()
    local, warm = (Teacher(language_model(model_of(args.seed), words), words, cache_bytes=n) for n in (0, 2**30))

    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve, args=(args.seed, theirs), daemon=True)
    process.start()
    settings = ServerSettings(f"http://127.0.0.1:{ours.recv()}/v1", concurrency=4)
    remote = ServerTeacher("teacher", Server(settings, VOCABULARY), words, local.rules, append_eos=False)

    def server_seconds() -> float:
        ours.send("how long?")
        return ours.recv()

    seconds: dict[str, list[float]] = {"local": [], "warm": [], "client": [], "server": []}
    for _ in range(turns + 1):  # the first loads kernels
        spent, mine = cpu_seconds(lambda: local.score(texts, answers, mask))
        kept, _ = cpu_seconds(lambda: warm.score(texts, answers, mask))
        before = server_seconds()
        client, its = cpu_seconds(lambda: remote.score(texts, answers, mask))
        measured = {"local": spent, "warm": kept, "client": client, "server": server_seconds() - before}
        for name, value in measured.items():
            seconds[name].append(value)
    ours.send("stop")
    process.join()
    middle = {name: median(values[1:]) for name, values in seconds.items()}
    difference = (induced_advantage(mine, "max") - induced_advantage(its, "max")).abs().max().item()
    middle["both"] = middle["client"] + middle["server"]
    named = {"local": "the model itself", "warm": "the same, prompts cached", "both": "through the server",
             "client": "   of it in the client"}  # fmt: skip
    show(
        f"Scoring {rows} answers of {ANSWER} tokens to prompts of {PROMPT}, V {VOCABULARY:,}",
        ["way", "CPU s", "answer tokens per CPU s"],
        [[name, f"{middle[way]:.3f}", f"{rows * ANSWER / middle[way]:,.0f}"] for way, name in named.items()],
    )
    report({
        "server_over_local": middle["local"] / middle["both"],
        "server_over_warm": middle["warm"] / middle["both"],
        "client_share": middle["client"] / middle["both"],
        "regret_max_abs_diff": difference,
    })  # fmt: skip


if __name__ == "__main__":
    main()
