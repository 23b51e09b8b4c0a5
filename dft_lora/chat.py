"""A conversation with a run in the terminal, beside the untouched base if asked: `dft-lora chat RUN_DIR`.

Run and base answer in one batch. The run's answer is shown as it is written, then the base's. Each of them
remembers its own answers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from typing import TextIO

from .errors import RequestError
from .evaluation.run_set import recipes_of, renderer_of, unchanged_base
from .model.generate import Request, stream
from .model.head import check_head
from .model.limits import UNLIMITED, positions
from .model.load import load_adapters, load_base
from .runs.folder import RunFolder

NEW = "/new"


@dataclass
class Speaker:
    """The run or the base, and the conversation as it knows it."""

    name: str
    adapter: str | None
    turns: list[dict[str, str]] = field(default_factory=list)


class Chat:
    """A run, loaded, and the conversation with it. `forgets`: its template takes one turn.

    Raises RequestError for a run without an adapter, or whose base or template has changed.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        base: bool = False,
        system: str | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 0,
    ):
        if not run.has_adapter:
            raise RequestError(f"{run.path}: has no adapter; name a trained run (--base shows its base too)")
        recipes = recipes_of([run], [])
        unchanged_base([run], recipes[0].model)
        self.renderer = renderer_of([run], recipes)
        self.temperature, self.max_new_tokens, self.seed = temperature, max_new_tokens, seed
        self.forgets = self.renderer.template.text is not None
        model, _ = load_base(recipes[0].model, for_answers=True)
        check_head(model)
        self.positions = positions(model.config) or UNLIMITED
        self.model = load_adapters(model, {"run": run.adapter})
        self.start = [{"role": "system", "content": system}] if system else []
        self.notes: list[str] = []
        """What the last answers do not show: that they were cut, or that turns were forgotten."""
        self.speakers = [Speaker(run.name, "run")] + ([Speaker("base", None)] if base else [])
        self.forget()

    def forget(self) -> None:
        """Start a new conversation."""
        for speaker in self.speakers:
            speaker.turns = list(self.start)

    def say(self, message: str) -> Iterator[tuple[Speaker, str]]:
        """The answers to a message, piece by piece: all of the first speaker's, then the next one's.

        Closing the iterator stops the answers; what was written stays in the conversation. Raises
        RequestError for a message that the model's positions have no room for.
        """
        self.notes = []
        if self.forgets:
            self.forget()
        for speaker in self.speakers:
            speaker.turns.append({"role": "user", "content": message})
        texts = [""] * len(self.speakers)
        try:
            for index, text in self._written([self._request(speaker) for speaker in self.speakers]):
                piece, texts[index] = text[len(texts[index]) :], text
                yield self.speakers[index], piece
        finally:
            for speaker, text in zip(self.speakers, texts, strict=True):
                if text:
                    speaker.turns.append({"role": "assistant", "content": text})
                else:
                    speaker.turns.pop()

    def _request(self, speaker: Speaker) -> Request:
        """The next answer that is wanted. The oldest turns are forgotten if there is no room for them."""
        turns = list(speaker.turns)
        first = len(self.start)
        while True:
            prompt = tuple(self.renderer.prompt_ids(turns))
            room = self.positions - len(prompt)
            if room >= min(self.max_new_tokens, self.positions // 4) or len(turns) <= first + 1:
                break
            del turns[first : first + 2]
        if room < 1:
            raise RequestError(f"{len(prompt)} tokens are too many; the model takes {self.positions}")
        if len(turns) < len(speaker.turns):
            what = f"its context of {self.positions} tokens is full"
            self.notes.append(f"{speaker.name} no longer sees the oldest turns: {what}")
        speaker.turns = turns
        most = min(self.max_new_tokens, room)
        return Request(prompt, speaker.adapter, self.seed, self.temperature, max_new_tokens=most)

    def _written(self, requests: list[Request]) -> Iterator[tuple[int, str]]:
        """(request, its text so far) whenever it has grown, in the order of requests."""
        ids: list[list[int]] = [[] for _ in requests]
        current = 0
        stops, pad = self.renderer.stop_ids, self.renderer.pad_id
        with closing(stream(self.model, requests, stop_ids=stops, pad_id=pad)) as steps:
            for step in steps:
                alive = set()
                for index, token in step:
                    if token not in stops:
                        ids[index].append(token)
                        alive.add(index)
                # a character may take several tokens: half of one is not shown
                yield current, self.renderer.decode(ids[current]).rstrip("\ufffd")
                while current + 1 < len(requests) and current not in alive:
                    current += 1
        for index in range(current, len(requests)):
            yield index, self.renderer.decode(ids[index])
        for speaker, request, written in zip(self.speakers, requests, ids, strict=True):
            if len(written) == request.max_new_tokens:
                self.notes.append(f"{speaker.name}: cut after {len(written)} tokens")


def converse(chat: Chat, messages: Iterable[str], out: TextIO, note: TextIO) -> None:
    """Answer messages until they end. Ctrl-C stops an answer; between answers it ends the conversation."""
    named = len(chat.speakers) > 1
    with suppress(KeyboardInterrupt):
        for message in messages:
            if message.strip() == NEW:
                chat.forget()
                print("(a new conversation)", file=note)
            elif message.strip():
                _answer(chat, message, named, out, note)
    print(file=note)


def _answer(chat: Chat, message: str, named: bool, out: TextIO, note: TextIO) -> None:
    shown: Speaker | None = None
    try:
        with closing(chat.say(message)) as pieces:
            for speaker, piece in pieces:
                if speaker is not shown:
                    lead = f"{speaker.name}> " if named else ""
                    out.write(f"\n{lead}" if shown else lead)
                    shown = speaker
                out.write(piece)
                out.flush()
    except KeyboardInterrupt:
        print("\n(stopped; Ctrl-C again or Ctrl-D ends the conversation)", file=note)
    except RequestError as error:
        print(f"({error})", file=note)
    if shown:
        print(file=out, flush=True)
    for line in chat.notes:
        print(f"({line})", file=note)


def typed(stdin: TextIO) -> Iterator[str]:
    """Messages from a person at the terminal, or the lines of a pipe."""
    if not stdin.isatty():
        for line in stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # makes input() editable, with a history
    with suppress(EOFError):
        while True:
            yield input("you> ")


def chat(run: RunFolder, **options) -> None:
    """Load the run and talk until the input ends. `options`: see Chat."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    conversation = Chat(run, **options)
    if sys.stdin.isatty():
        remembers = "; its template takes one turn only" if conversation.forgets else ""
        print(f"{run.path}: Ctrl-D ends, {NEW} starts over{remembers}", file=sys.stderr)
    converse(conversation, typed(sys.stdin), sys.stdout, sys.stderr)
