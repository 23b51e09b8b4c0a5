"""The conversation in the terminal: several turns, the base beside the run, and every way to end it."""

import io
import os
import pty
import select
import signal
import sys
import time
from contextlib import closing

import pytest
from click.testing import CliRunner
from patience import HANG

from dft_lora import chat as module
from dft_lora.chat import Chat, converse
from dft_lora.cli import main
from dft_lora.data.templates import Renderer
from dft_lora.errors import RequestError
from dft_lora.experiments.shipped import shipped_runs
from dft_lora.model.generate import Request, generate

ASKED = "Tom has 9 eggs. Tom sells 4. How many eggs are left?"


@pytest.fixture(scope="module")
def loaded():
    return Chat(shipped_runs()[1], base=True, max_new_tokens=24)


@pytest.fixture
def chat(loaded):
    loaded.forget()
    return loaded


def alone(chat, speaker, turns):
    """The naive twin: one greedy request in a batch of its own."""
    request = Request(
        tuple(chat.renderer.prompt_ids(turns)), speaker.adapter, 0, temperature=0, max_new_tokens=24
    )
    stops, pad = chat.renderer.stop_ids, chat.renderer.pad_id
    (done,) = generate(chat.model, [request], stop_ids=stops, pad_id=pad)
    return chat.renderer.decode(done.ids)


def test_each_speaker_answers_and_remembers_its_own_answers(chat):
    for message in (ASKED, "And 2 more?"):
        before = [list(speaker.turns) for speaker in chat.speakers]
        pieces = list(chat.say(message))
        order = [speaker.name for speaker, _ in pieces]
        assert order == sorted(order, reverse=True), "first all of sft's pieces, then the base's"
        for speaker, turns in zip(chat.speakers, before, strict=True):
            asked = [*turns, {"role": "user", "content": message}]
            text = "".join(piece for who, piece in pieces if who is speaker)
            assert text == alone(chat, speaker, asked) != ""
            assert speaker.turns == [*asked, {"role": "assistant", "content": text}]
    assert len(chat.speakers[0].turns) == 4


def test_a_stopped_answer_keeps_what_was_written(chat):
    with closing(chat.say(ASKED)) as pieces:
        written = "".join(next(pieces)[1] for _ in range(3))
    sft, base = chat.speakers
    assert [turn["content"] for turn in sft.turns] == [ASKED, written]
    assert base.turns == [], "nothing of the base was shown yet"


def test_the_oldest_turns_are_forgotten_when_there_is_no_room(chat, monkeypatch):
    list(chat.say(ASKED))
    taken = len(chat.renderer.prompt_ids(chat.speakers[0].turns))
    monkeypatch.setattr(chat, "positions", taken + 10)
    list(chat.say(ASKED))
    assert any("no longer sees the oldest turns" in line for line in chat.notes)
    assert [turn["content"] for turn in chat.speakers[0].turns][0::2] == [ASKED]
    monkeypatch.setattr(chat, "positions", 5)
    before = list(chat.speakers[1].turns)
    with pytest.raises(RequestError, match="too many; the model takes 5"):
        list(chat.say(ASKED))
    assert chat.speakers[1].turns == before


def test_a_template_of_one_turn_forgets(chat, monkeypatch):
    monkeypatch.setattr(chat, "renderer", Renderer(chat.renderer.tokenizer, "plain"))
    monkeypatch.setattr(chat, "forgets", True)
    for _ in range(2):
        list(chat.say(ASKED))
        assert len(chat.speakers[0].turns) == 2


def test_a_system_turn_stays_at_the_start(chat, monkeypatch):
    monkeypatch.setattr(chat, "start", [{"role": "system", "content": "Be brief."}])
    chat.forget()
    list(chat.say(ASKED))
    chat.forget()
    assert [turn["role"] for turn in chat.speakers[0].turns] == ["system"]


def talk(chat, messages):
    out, note = io.StringIO(), io.StringIO()
    converse(chat, messages, out, note)
    return out.getvalue(), note.getvalue()


def test_a_conversation_as_it_is_shown(chat):
    said, noted = talk(chat, [ASKED, "", "/new"])
    sft, base = (alone(chat, s, [{"role": "user", "content": ASKED}]) for s in chat.speakers)
    assert said == f"sft> {sft}\nbase> {base}\n" and "a new conversation" in noted
    assert chat.speakers[0].turns == []


def test_an_answer_that_was_cut_is_marked(chat, monkeypatch):
    monkeypatch.setattr(chat, "max_new_tokens", 3)
    _, noted = talk(chat, [ASKED])
    assert "(sft: cut after 3 tokens)\n(base: cut after 3 tokens)" in noted


def test_ctrl_c_stops_an_answer_and_between_answers_ends_the_conversation(chat, monkeypatch):
    whole = module.stream

    def interrupted(*args, **options):
        for i, step in enumerate(whole(*args, **options)):
            if i == 2:
                raise KeyboardInterrupt
            yield step

    def messages():
        yield ASKED
        monkeypatch.setattr(module, "stream", whole)
        yield "And 2 more?"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream", interrupted)
    said, noted = talk(chat, messages())
    assert noted.count("stopped; Ctrl-C again") == 1
    assert said.count("sft> ") == 2 and len(chat.speakers[0].turns) == 4


def test_a_pipe_and_bytes_that_are_no_text():
    arguments = ["chat", str(shipped_runs()[1].path), "--max-new-tokens", "8"]
    done = CliRunner().invoke(main, arguments, input=b"What is 2 + 3?\n\xff\xfe\n")
    assert done.exit_code == 0 and len(done.stdout.split()) >= 2 and "Traceback" not in done.output


@pytest.mark.slow
@pytest.mark.parametrize("key", [b"\x03", b"\x04"])
def test_ctrl_c_and_ctrl_d_at_a_terminal_end_with_exit_code_0(key):
    arguments = ["-m", "dft_lora", "chat", str(shipped_runs()[1].path), "--max-new-tokens", "8"]
    child, ours = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        os.execv(sys.executable, [sys.executable, *arguments])
    seen, until = b"", time.monotonic() + HANG

    def read_until(text):
        nonlocal seen
        while text not in seen:
            assert time.monotonic() < until, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096)
        seen = seen.split(text, 1)[1]

    read_until(b"you> ")
    os.write(ours, b"What is 2 + 3?\n")
    read_until(b"\n")
    read_until(b"you> ")
    os.write(ours, key)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
