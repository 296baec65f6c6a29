"""A conversation at the terminal, with the trained model, its base, or both."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text as StyledText
from torch import Tensor
from transformers.generation.streamers import TextStreamer
from typing_extensions import override

from lightning_lora.cli.generate.answers import END_OF_TURN, Answer, generate
from lightning_lora.cli.generate.decoding import Sampling
from lightning_lora.cli.generate.loading import Loaded
from lightning_lora.cli.generate.view import ANSWER, BASE, TUNED, printable, terminal
from lightning_lora.data.records import Conversation, Message
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import DataError
from lightning_lora.tasks.end_of_turn import stop_ids

HELP = "/reset: forget all; /quit or Ctrl-D: end; Ctrl-C: stop the answer"
HELP_WITH_BASE = f"/compare: both answer, and the tuned answer is remembered; /base: the base answers; {HELP}"
_SPEAKERS = {"/compare": (BASE, TUNED), "/base": (BASE,)}


@dataclass
class Dialogue:
    """A conversation that goes on.

    Args:
        loaded: The model and its base.
        rows: How messages become tokens.
        sampling: How tokens are chosen.
        system: System message of the conversation.
        speakers: Who answers: the tuned model, the base, or both.
        messages: What was said so far.
    """

    loaded: Loaded
    rows: RowSettings
    sampling: Sampling
    system: str | None
    speakers: tuple[str, ...] = (TUNED,)
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str, console: Console) -> None:
        """Answer a message, token by token, and remember both.

        Raises:
            DataError: If the conversation cannot be rendered or is too long; it is then as it was.
        """
        record = Conversation("this conversation", [*self.messages, {"role": "user", "content": text}])
        answers: dict[str, Answer] = {}
        for speaker in self.speakers:
            console.print(StyledText(f"{speaker}> ", "bold"), end="")
            answers[speaker] = self._answer(speaker, record, console)
            if answers[speaker].stop != END_OF_TURN:
                console.print(StyledText(f"({answers[speaker].stop})", "dim"))
        said = answers[self.speakers[-1]].text
        self.messages = [*record.messages, {"role": "assistant", "content": said}]

    def _answer(self, speaker: str, record: Conversation, console: Console) -> Answer:
        model = self.loaded.base() if speaker == BASE else nullcontext(self.loaded.model)
        with model as asked, _interrupt() as interrupt:
            printer = _Printer(self.loaded.tokenizer, console, stop_ids(asked, self.loaded.tokenizer, self.rows))

            def show(tokens: Tensor) -> bool:
                printer.put(tokens)
                return interrupt.asked

            (answer,) = generate(asked, self.loaded.tokenizer, [record], self.rows, self.sampling, show)
            printer.end()
        return answer


def chat(loaded: Loaded, rows: RowSettings, sampling: Sampling, system: str | None, compare: bool) -> None:
    """Read messages from standard input and answer them until it ends."""
    console = terminal()
    alone = (TUNED,) if loaded.has_base else (ANSWER,)
    dialogue = Dialogue(loaded, rows, sampling, system, (BASE, TUNED) if compare else alone)
    _help(dialogue)
    while (text := _read()) is not None and text != "/quit":
        if text.startswith("/"):
            _obey(dialogue, text)
        elif text:
            try:
                dialogue.ask(text, console)
            except DataError as error:
                print(f"error: {DataError(f'{error} /reset starts anew.')}", file=sys.stderr)


def _read() -> str | None:
    """The next message; None at the end. An interrupt leaves the line that was being written."""
    while True:
        try:
            return input("you> ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D to end)", file=sys.stderr)


def _obey(dialogue: Dialogue, command: str) -> None:
    if command in _SPEAKERS and dialogue.loaded.has_base:
        # The same command again goes back to the tuned model.
        dialogue.speakers = (TUNED,) if dialogue.speakers == _SPEAKERS[command] else _SPEAKERS[command]
        print(f"now answering: {' and '.join(dialogue.speakers)}", file=sys.stderr)
    elif command in _SPEAKERS:
        print("there is no base to ask: start with --compare, or name one with --base", file=sys.stderr)
    elif command == "/reset":
        dialogue.reset()
        print("the conversation starts anew", file=sys.stderr)
    else:
        _help(dialogue)


def _help(dialogue: Dialogue) -> None:
    print(HELP_WITH_BASE if dialogue.loaded.has_base else HELP, file=sys.stderr)


class _Printer(TextStreamer):
    """Prints the words of an answer as they come, without its end token and with nothing that acts on the terminal."""

    def __init__(self, tokenizer: Any, console: Console, stop_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, clean_up_tokenization_spaces=False)
        self.console = console
        self.stop_ids = stop_ids

    @override
    def put(self, value: Tensor) -> None:
        """Print what has become whole words, but for the token that ends the answer."""
        if value.tolist()[-1] not in self.stop_ids:
            super().put(value)

    @override
    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.file.write(printable(text) + ("\n" if stream_end else ""))
        self.console.file.flush()


class _Interrupt:
    """Notes that the user has pressed Ctrl-C, which stops the answer; pressed again, it ends the program."""

    asked = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the first interrupt."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def _interrupt() -> Iterator[_Interrupt]:
    """Within the context, Ctrl-C stops the answer only."""
    interrupt = _Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
