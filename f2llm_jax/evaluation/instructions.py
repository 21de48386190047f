"""Which instruction a text of an MTEB task gets.

The table is the published model's (mteb's `codefuse_models.py`, 395 entries by task name, task type or prompt type), read from
mteb, so it is always the one that the leaderboard uses. Documents get none; texts of tasks without queries (clustering,
classification, STS, ...) all get the task's. A user's own table goes before it, entry by entry.
"""

import difflib
import json
from collections.abc import Iterable, Mapping

from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.text import INSTRUCTION_TEMPLATE, query_prompt


class InstructionsError(UserError):
    """A table of instructions that cannot be used; the message names the entry."""


def published() -> dict[str, str]:
    """The published model's table: instruction by task name, task type or prompt type."""
    from mteb.models.model_implementations.codefuse_models import f2llmv2_prompts_dict

    return dict(f2llmv2_prompts_dict)


def read_instructions(path: epath.PathLike, names: Iterable[str] = ()) -> dict[str, str]:
    """A user's table from a JSON file.

    Args:
      path: one JSON object, instruction by task name, task type or prompt type; an empty instruction means none.
      names: tasks that mteb does not know.

    Raises:
      InstructionsError: the file is not such an object, or a key is no name of a task or type.
    """
    from mteb.get_tasks import _TASKS_REGISTRY as registry

    try:
        table = json.loads(epath.Path(path).read_text())
    except ValueError as error:
        raise InstructionsError(f"{path} is not JSON ({error}); write one object, instruction by task") from error
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise InstructionsError(f"{path} is not one object of strings; write it as {{task: instruction}}")
    known = {*registry, *names, *task_types(), "query"}
    for key in table:
        if key not in known:
            raise InstructionsError(f"{path}: {key!r} is no task, task type or 'query'{near(key, known)}")
    return table


def task_types() -> tuple[str, ...]:
    """The task types that mteb knows."""
    from typing import get_args

    from mteb.abstasks.task_metadata import TaskType

    return get_args(TaskType)


def prompt(table: Mapping[str, str], task, prompt_type, template: str = INSTRUCTION_TEMPLATE) -> str:
    """What comes before a text: the instruction in the template, "" for a document.

    The order is that of mteb's `AbsEncoder.get_instruction`: by task name, task type and prompt type, then the task's own.

    Args:
      table: of instructions.
      task: mteb's `TaskMetadata`.
      prompt_type: mteb's `PromptType`; None for texts that are neither queries nor documents.
      template: of the model (`EmbeddingConfig.instruction_template`).
    """
    from mteb.abstasks.abstask import get_abstask_prompt

    kind = prompt_type.value if prompt_type else None
    if kind == "document":
        return ""
    for key in (task.name, task.type, kind):
        if key is not None and key in table:
            return query_prompt(table[key], template)
    if isinstance(task.prompt, dict) and kind:
        return query_prompt(task.prompt.get(kind, ""), template)
    own = None if isinstance(task.prompt, dict) else task.prompt
    return query_prompt(own or get_abstask_prompt(task.name), template)


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error's sentence: up to five known names like `name`."""
    folded = {one.casefold(): one for one in known}
    found = [folded[one] for one in difflib.get_close_matches(name.casefold(), folded, n=5, cutoff=0.5)]
    return f"; did you mean {', '.join(map(repr, found))}?" if found else ""
