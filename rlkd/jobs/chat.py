"""The settings of prompts in a chat template, the teacher's and the student's each their own."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class TeacherChatArguments:
    """Whether the teacher reads its prompts as turns of a chat."""

    teacher_chat: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the teacher's prompts stand in its tokenizer's chat template: true for models tuned for "
            "chats. null: only if rlkd trained it so."
        },
    )
    teacher_system_prompt: str | None = field(
        default=None, metadata={"help": "Text of the system turn before them; null: as the template has it."}
    )


@dataclass(kw_only=True)
class StudentChatArguments:
    """Whether the student does."""

    student_chat: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the student's prompts stand in its tokenizer's chat template, in which it is then to be "
            "used. null: only if rlkd trained it so."
        },
    )
    student_system_prompt: str | None = field(
        default=None, metadata={"help": "Text of the system turn before them; null: as the template has it."}
    )
