"""The card of an exported student: what it is, what was measured, and a program that serves it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..io.cards import cell, front_matter, table
from ..models.chat import chat_of
from ..models.spec import ModelSpec
from ..models.vocabulary import encode_texts
from ..sampling.exported import Exported

if TYPE_CHECKING:
    from .export import Form

FOLDER = "path/to/this/folder"


def export_card(
    exported: Exported, student: ModelSpec, forms: Sequence[Form], settings: Mapping[str, Any], inputs: int
) -> str:
    """The card as Markdown with metadata; forms: the export first; inputs: how many were compared."""
    import ctranslate2

    metadata = {"library_name": "ctranslate2", "pipeline_tag": "text-generation", "tags": ["rlkd", "ctranslate2"]}
    name = cell(Path(student.name).name if os.path.isdir(student.name) else student.name)
    sections = [
        f"# {name} for CTranslate2 ({settings['quantization']})",
        f"Converted by rlkd {__version__} for CTranslate2 {ctranslate2.__version__}; an adapter is merged.",
        "## Measured",
        f"{results(forms)}\n\n{inputs} inputs, greedy answers of at most {settings['max_new_tokens']} tokens, inputs "
        f"cut to {settings['max_input_tokens']}. Equal: the share of answers, and of their tokens, that the student "
        "gives in PyTorch, too. Speed is of the CPU of the machine that converted, with as many threads for all.",
        "## Use",
        snippet(exported, student, settings),
        "## Limits",
        "- The answers are greedy. With other options than those above (beams, sampling) nothing was measured.\n"
        "- CTranslate2 answers an empty text with an empty answer.\n"
        "- It has the errors and biases of the student; its outputs were not checked for factual accuracy.",
    ]
    return f"{front_matter(metadata)}\n\n" + "\n\n".join(sections) + "\n"


def results(forms: Sequence[Form]) -> str:
    """What was measured, as a Markdown table."""
    header = ("model", "MB", "tokens / s", "equal answers", "equal tokens")
    rows = [(form.name, *map(str, numbers(form))) for form in forms]
    return table(header, rows)


def numbers(form: Form) -> list[str]:
    """The columns of `results` after the name."""
    shares = ["" if share is None else f"{share:.1%}" for share in (form.equal_answers, form.equal_tokens)]
    return [f"{form.megabytes:.4g}", f"{form.tokens_per_second:.4g}", *shares]


def snippet(exported: Exported, student: ModelSpec, settings: Mapping[str, Any]) -> str:
    """A program that answers as was measured, with ctranslate2 and the tokenizer alone."""
    options = "".join(f", {name}={value!r}" for name, value in exported.options(settings["max_new_tokens"]).items())
    prefix = f", target_prefix=[{exported.prefix!r}] * len(tokens)" if exported.prefix else ""
    template = settings["student_template"]
    if exported.continues:
        kind, call, part = "Generator", f"generate_batch(tokens{options})", "sequences"
    else:
        kind, call, part = "Translator", f"translate_batch(tokens{options}{prefix})", "hypotheses"
    lines = (
        "import ctranslate2",
        "from transformers import AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")',
        f'model = ctranslate2.{kind}("{FOLDER}")',
        f"# The student reads inputs under the template {cell(str(template))}." if template else None,
        'texts = ["A text."]',
        *_ids(exported, student, settings["max_input_tokens"]),
        "tokens = [tokenizer.convert_ids_to_tokens(row) for row in ids]",
        f"results = model.{call}",
        f"answers = [tokenizer.convert_tokens_to_ids(result.{part}[0]) for result in results]",
        "print(tokenizer.batch_decode(answers, skip_special_tokens=True))",
    )
    code = "\n".join(line.replace("```", "") for line in lines if line is not None)
    return f"```python\n{code}\n```"


def _ids(exported: Exported, student: ModelSpec, max_input_tokens: int) -> list[str]:
    """The lines that encode the texts."""
    chat = chat_of(student.tokenizer)
    if chat is None:
        plain = f"ids = tokenizer(texts, truncation=True, max_length={max_input_tokens}).input_ids"
        return [
            plain,
            *(["ids = [row[:-1] for row in ids]  # without the end"] if _writes_end(exported, student) else []),
        ]
    system = "" if chat.system is None else f'{{"role": "system", "content": {chat.system!r}}}, '
    return [
        "# It reads every input as the user's turn of its chat template.",
        f'chats = [[{system}{{"role": "user", "content": text}}] for text in texts]',
        "ids = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True).input_ids",
    ]


def _writes_end(exported: Exported, student: ModelSpec) -> bool:
    """Whether the tokenizer ends texts that the student's answers are to continue."""
    if not exported.continues:
        return False
    (whole,), (cut,) = (encode_texts(student.tokenizer, ["a"], 99, append_eos=end) for end in (True, False))
    return whole != cut
