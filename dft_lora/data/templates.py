"""One renderer, from messages to ids, for training, evaluation and the page.

A training sequence is `prompt ids + solution ids + end token`. The prompt part comes from the same call that
makes a generation prompt, so the two cannot drift apart. Prompt and solution are tokenised separately, so the
ids of one do not depend on the other. The end token is the tokenizer's own eos (a base model's
`<|endoftext|>`); generation also stops at the chat template's end-of-turn token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import LONGEST_FILE, digest
from ..errors import DataError, RecipeError, did_you_mean, one_line
from ..tasks.base import Problem

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Template:
    """How a prompt is written.

    `text` contains one `{question}`, and perhaps one `{system}` for the content of a system turn (empty
    without one). Without `text` a chat template is used: `chat`, in Jinja, or else the tokenizer's own, and
    `suffix` is appended to the last user turn.
    """

    name: str
    """For a person's own template its whole text, so a run needs no file later."""
    text: str | None = None
    chat: str | None = None
    suffix: str = ""


PROBE = ({"role": "user", "content": "What is 2 + 3?"},)
TOGETHER = 1000
"""Problems that are tokenized at a time."""
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

TEMPLATES = {
    template.name: template
    for template in (
        Template("chat"),
        Template("plain", text="Question: {question}\nAnswer:\n"),
        Template("raw", text="{question}"),
        Template("chat-boxed", suffix=f"\n{BOXED}"),
        # The three protocols of the paper's evaluation, as text, independent of the tokenizer's template.
        Template(
            "qwen-boxed",
            text="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{question}\n"
            + BOXED
            + "<|im_end|>\n<|im_start|>assistant\n",
        ),
        Template("llama-base-boxed", text="{question}\n" + BOXED + "\n"),
        Template("deepseek-math", text="User: {question}\n" + BOXED + "\n\nAssistant:"),
    )
}


def get_template(name: str, tokenizer: Any) -> Template:
    """A template by name, or a person's own; `auto` is `chat` if the tokenizer has one, else `plain`.

    Raises RecipeError for an unknown name, an own template that cannot be used, or for `chat` without a chat
    template.
    """
    if name == "auto":
        name = "chat" if tokenizer.chat_template else "plain"
    if name not in TEMPLATES:
        return own_template(name)
    if TEMPLATES[name].text is None and not tokenizer.chat_template:
        raise RecipeError(
            f"template {name!r} needs a tokenizer with a chat template; use data.template: plain"
        )
    return TEMPLATES[name]


def own_template(given: str) -> Template:
    """A template from its own text, or from a file: plain text with `{question}`, or a Jinja chat template.

    Raises RecipeError if it is neither.
    """
    text = given if _is_written_out(given) else _read_template(given)
    if _is_jinja(text):
        return Template(text, chat=text)
    for place, least in (("{question}", 1), ("{system}", 0)):
        if not least <= text.count(place) <= 1:
            raise RecipeError(
                f"template {shown(text)}: must contain {place} once, not {text.count(place)} times"
            )
    return Template(text, text=text)


def _is_jinja(text: str) -> bool:
    return "{%" in text or "{{" in text


def _is_written_out(text: str) -> bool:
    return "{question}" in text or _is_jinja(text)


def _read_template(name: str) -> str:
    """The content of a template file."""
    if not os.path.isfile(name):
        known = f"{did_you_mean(name, TEMPLATES)}; known: {', '.join(TEMPLATES)}"
        raise RecipeError(
            f"template {shown(name)} is unknown{known}; or give a text with {{question}}, or a file with "
            "such a text or a chat template"
        )
    try:
        if (size := os.path.getsize(name)) > LONGEST_FILE:
            raise RecipeError(f"template {name}: {size:,} bytes are too many (at most {LONGEST_FILE:,})")
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"template {name}: not UTF-8 text ({error})") from None
    except OSError as error:
        raise RecipeError(f"template {name}: {error.strerror}") from None
    if not _is_written_out(text):
        raise RecipeError(f"template {name}: has no {{question}}, and is no chat template in Jinja")
    return text


def shown(name: str) -> str:
    """A template's name in one line: of an own template its beginning, and a digest of the whole."""
    if not _is_written_out(name):
        return repr(name)
    start = " ".join(name.split())
    return f"{start[:30]!r}... ({digest(name)[:8]})" if len(start) > 30 else repr(start)


@dataclass(frozen=True)
class Example:
    """One rendered example: `ids[:prompt_length]` is the prompt, the rest solution and end token."""

    id: str
    ids: tuple[int, ...]
    prompt_length: int
    signals: Mapping[str, float | Sequence[float]] = field(default_factory=dict, hash=False)
    """What an objective reads besides the tokens (`Objective.signals`), by name: one number per example
    (the sign of a preference, an advantage), or one per supervised token (old log-probabilities)."""

    @property
    def supervised(self) -> int:
        """Label tokens; the first position has no prediction, so it never counts."""
        return len(self.ids) - max(1, self.prompt_length)


def spaced(before: str, after: str) -> str:
    """Two texts, with a space between them unless there is white space already."""
    return before + after if not before or before[-1].isspace() else f"{before} {after}"


class Renderer:
    """A template bound to a tokenizer. `shots`: solved problems of one turn, written before every prompt.

    Raises ModelError when the tokenizer has no end token, RecipeError when a template cannot be used.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", shots: Sequence[Problem] = ()):
        self.tokenizer, self.shots = tokenizer, shots
        self.template = get_template(template, tokenizer)
        if tokenizer.eos_token_id is None:
            from ..errors import ModelError

            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r} has no eos token, so an answer could never end"
            )
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        if self.template.chat is not None:
            self._check_chat()

    def after(self, shots: Sequence[Problem]) -> Renderer:
        """This renderer with solved problems before every prompt."""
        return Renderer(self.tokenizer, self.template.name, shots) if shots else self

    def prompt_text(self, messages: Messages) -> str:
        """The prompt as text, up to the point where the answer begins."""
        if self.template.text is not None:
            solved = [spaced(self._filled(shot.messages), str(shot.solution)) for shot in self.shots]
            return "\n\n".join([*solved, self._filled(messages)])
        turns = [dict(turn) for turn in messages]
        turns[-1]["content"] += self.template.suffix
        first = int(turns[0]["role"] == "system")
        turns[first:first] = [turn for shot in self.shots for turn in self._solved(shot)]
        return self._chat(turns, add_generation_prompt=True)

    def _filled(self, messages: Messages) -> str:
        """A template's text with the turns in it."""
        text, turns = str(self.template.text), list(messages)
        parts = {"{system}": ""}
        if "{system}" in text and turns[0]["role"] == "system":
            parts["{system}"] = turns.pop(0)["content"]
        if len(turns) != 1:
            name = shown(self.template.name)
            raise DataError(f"template {name} takes one user turn, not {len(turns)}; use template: chat")
        parts["{question}"] = turns[0]["content"]
        # In one pass: a question may itself contain the word {system}.
        return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], text)

    def _solved(self, shot: Problem) -> list[dict[str, str]]:
        """A solved problem as two turns of a chat."""
        return [
            {"role": "user", "content": shot.question + self.template.suffix},
            {"role": "assistant", "content": str(shot.solution)},
        ]

    def _chat(self, turns: Messages, **more: Any) -> str:
        """Turns through the chat template. Raises DataError for turns that it refuses."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template.chat, tokenize=False, **more
            )
        except TemplateError as error:
            why = f"template {shown(self.template.name)} refuses these turns: {one_line(error)}"
            raise DataError(why) from None

    def _check_chat(self) -> None:
        """Raises RecipeError for a chat template that does not work, or leaves the question out."""
        try:
            text = self.prompt_text(PROBE)
        except Exception as error:  # a template is a program, and can raise anything
            why = f"template {shown(self.template.name)} is no chat template: {one_line(error)}"
            raise RecipeError(why) from None
        if PROBE[0]["content"] not in text:
            raise RecipeError(f"template {shown(self.template.name)}: leaves out the user's message")

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The prompt's ids, with the tokenizer's BOS exactly once if it uses one."""
        return self.text_ids(self.prompt_text(messages))

    def text_ids(self, text: str) -> list[int]:
        """The ids of a text that begins with a prompt, with the BOS as in `prompt_ids`."""
        return self._with_bos(self._encode(text))

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def completion_ids(self, text: str) -> list[int]:
        """The solution's ids and the end token."""
        return [*self._encode(text), self.eos_id]

    def render(self, problem: Problem) -> Example:
        """A training sequence. The problem must have a solution."""
        return self.render_all([problem])[0]

    def render_all(self, problems: Sequence[Problem]) -> list[Example]:
        """`render` for each problem, TOGETHER of them tokenized at a time.

        A call costs more than the few words of one problem, and holds 100 bytes per token until it is done.
        """
        return [
            example
            for i in range(0, len(problems), TOGETHER)
            for example in self._render(problems[i : i + TOGETHER])
        ]

    def _render(self, problems: Sequence[Problem]) -> list[Example]:
        solutions = [problem.solution for problem in problems]
        assert None not in solutions
        texts = [*(self.prompt_text(problem.messages) for problem in problems), *solutions]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            Example(problem.id, (*(prompt := self._with_bos(before)), *solution, self.eos_id), len(prompt))
            for problem, before, solution in zip(
                problems, ids[: len(problems)], ids[len(problems) :], strict=True
            )
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text, without end tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def has_text(self, texts: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        """Whether one of the texts occurs at the end of an answer, asked after each of its tokens.

        Only the last tokens are decoded: a token adds one byte at least, and a special token its name.
        """
        longest = max((len(text.encode()) for text in texts), default=0)

        def ends(ids: Sequence[int]) -> bool:
            tail = self.tokenizer.decode(list(ids[-longest - 8 :]))
            return any(text in tail for text in texts)

        return ends

    def pieces(self, ids: list[int], window: int = 8) -> list[str]:
        """The text that each token adds; special tokens by name.

        A character may take several tokens: it belongs to the last one. Each piece is the difference of two
        decodings that start at the same token, so a tokenizer that drops a leading space drops it in both.
        """
        decode, special = self.tokenizer.decode, set(self.tokenizer.all_special_ids)
        pieces = []
        for end in range(1, len(ids) + 1):
            if ids[end - 1] in special:
                pieces.append(decode([ids[end - 1]]))
                continue
            start = max(0, end - window)
            before, after = (decode(ids[start:stop]).rstrip("\ufffd") for stop in (end - 1, end))
            pieces.append(after[len(before) :])
        return pieces

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer: eos, and the token that closes a turn in the chat template."""
        return frozenset({self.eos_id, *self._turn_end})

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over a rendered probe and the end tokens; equal fingerprints mean equal prompts.

        Of an own template also over its text: a system turn or a second turn is not in the probe.
        """
        own = [] if self.template.name in TEMPLATES else [self.template.name]
        probe = [self.prompt_ids(PROBE), self.completion_ids("It is 5."), sorted(self.stop_ids)]
        return digest(probe + own)

    @cached_property
    def _bos(self) -> list[int]:
        """[bos] if the tokenizer adds one to plain text by itself."""
        bos, ids = self.tokenizer.bos_token_id, self.tokenizer("a")["input_ids"]
        return [bos] if bos is not None and ids[:1] == [bos] else []

    @cached_property
    def _turn_end(self) -> set[int]:
        if not (self.template.chat or self.tokenizer.chat_template):
            return set()
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = self._chat(turns)
        closing = self._encode(text[text.rindex("b") + 1 :].lstrip())[:1] if "b" in text else []
        return {
            i
            for i in closing
            if i in self.tokenizer.all_special_ids or i in self.tokenizer.added_tokens_decoder
        }

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
