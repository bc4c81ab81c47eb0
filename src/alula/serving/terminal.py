"""A chat in the terminal, or through pipes: lines in, streamed answers out.

Answers go to standard output and everything else to standard error, so ``echo question | alula chat MODEL > answer``
leaves the answer alone in the file.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from scipy.io import wavfile

from alula.data import AudioRef, ImageRef, VideoRef, samples
from alula.data.shapes import check_reading
from alula.data.videos import DEFAULT_FRAMES
from alula.errors import AlulaError, UsageError, visible
from alula.media import MEDIA
from alula.serving.conversation import Conversation, Reply

COMMANDS = {
    "/image PATH ...": "attach images to the next question",
    "/video PATH ...": "attach videos (animated GIF, WebP or PNG)",
    "/audio PATH ...": "attach audio clips (WAV)",
    "/draw TEXT": "have the model write an image, saved as PNG (adapters of method teal)",
    "/play TEXT": "have the model write a sound, saved as WAV (likewise)",
    "/points PATH ...": "attach point clouds; likewise /depth, /normals, /motion and /response",
    "/depth PATH unit=mm": "what a file leaves open is said behind it",
    "/detach": "forget what was attached to the next question",
    "/reset": "forget the conversation (the system prompt stays)",
    "/system TEXT": "set the system prompt and start over; without TEXT, drop it",
    "/help": "this list",
    "/exit": "leave (so does Ctrl-D); Ctrl-C stops an answer",
}


class Terminal:
    """Reads questions and commands, writes answers.

    Args:
        conversation: with whom.
        interactive: a person types: prompts, line editing, speed after each answer. None looks at the streams.
    """

    def __init__(self, conversation: Conversation, *, interactive: bool | None = None) -> None:
        self.conversation = conversation
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty() if interactive is None else interactive
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.failures = 0

    def run(self) -> int:
        """Talk until ``/exit`` or the end of the input.

        Returns:
            The number of lines that failed; each was reported and the chat went on.
        """
        if isinstance(sys.stdin, io.TextIOWrapper):
            with contextlib.suppress(io.UnsupportedOperation):  # somebody has read from it already
                sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 spoil their own line only
        if self.interactive:
            self._greet()
        for line in self._lines():
            try:
                if not self._line(line):
                    break
            except AlulaError as error:
                self.failures += 1
                self._complain(error)
        return self.failures

    def _lines(self) -> Iterator[str]:
        """Lines with something in them. Ctrl-C at the prompt clears the line, Ctrl-D ends."""
        if not self.interactive:
            yield from (line.strip() for line in sys.stdin if line.strip())
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  its import gives input() line editing and history
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print("\n[dim]/exit or Ctrl-D leaves[/dim]")
                continue
            if line:
                yield line

    def _line(self, line: str) -> bool:
        """Obey or answer one line; False to leave."""
        if any("\ud800" <= character <= "\udfff" for character in line):
            raise UsageError("the line is not UTF-8", where=repr(line)[1:-1][:60])
        if not line.startswith("/"):
            self._answer(line)
            return True
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/exit" | "/quit":
                return False
            case "/help":
                self._help()
            case "/detach":
                self.conversation.detach()
                self._say("nothing is attached")
            case "/reset":
                self.conversation.reset()
                self._say("starting over")
            case "/system":
                self.conversation.instruct(rest)
                self._say("system prompt set, starting over" if rest else "no system prompt, starting over")
            case "/image":
                self._attach(rest)
            case "/video" | "/film":
                self._attach_clips("video", rest)
            case "/audio" | "/sound":
                self._attach_clips("audio", rest)
            case "/draw":
                self._make("image", rest, command)
            case "/play":
                self._make("audio", rest, command)
            case _ if MEDIA.get(kind := command[1:]) is not None:
                self._attach_read(kind, rest)
            case _:
                raise UsageError(f"no command {command!r}", remedy=f"one of: {', '.join(COMMANDS)}")
        return True

    def _attach(self, rest: str) -> None:
        read = [(path, ImageRef.from_path(path).load()) for path in _paths(rest)]
        for path, image in read:
            self.conversation.attach(image)
            self._say(f"{path.name}, {image.width}x{image.height} px, goes with the next question")

    def _attach_clips(self, kind: str, rest: str) -> None:
        talk = self.conversation
        talk.require(kind)  # before the file is opened: what is wrong with it would be no help
        paths = _paths(rest, f"/{kind}")
        if kind == "video":
            frames = talk.intake.num_frames or DEFAULT_FRAMES
            clips = [VideoRef.from_path(path).load(frames) for path in paths]
        else:
            clips = [AudioRef.from_path(path).load(talk.intake.sampling_rate) for path in paths]
        for path, clip in zip(paths, clips, strict=True):
            talk.attach_clip(kind, clip)
            size = f"{len(clip)} frames" if kind == "video" else f"{len(clip):,} samples"
            self._say(f"{path.name}, {size}, goes with the next question")

    def _make(self, kind: str, text: str, command: str) -> None:
        """Have the model write an item, show it where that can be done, and save it in the working directory."""
        name = self.conversation.written_by(kind)
        if not text:
            raise UsageError("what?", where=command, remedy=f"{command} TEXT")
        self._answer(text, items=[name])

    def _keep(self, reply: Reply) -> None:
        for name, item in reply.items:
            is_image = isinstance(item, Image.Image)
            path = _unused(name, ".png" if is_image else ".wav")
            if is_image:
                item.save(path)
                if self.interactive:
                    sys.stdout.write(in_blocks(item))
            else:
                assert self.conversation.writer is not None
                rate = self.conversation.writer.codes[name].sampling_rate
                wavfile.write(path, rate, (np.clip(item, -1, 1) * 32767).astype(np.int16))
            self._say(f"saved as {path}")

    def _attach_read(self, kind: str, rest: str) -> None:
        """Attach media that are read with options: words with = behind the paths."""
        talk = self.conversation
        talk.require(kind)
        ref = samples.MEDIA[kind]
        words = rest.split()
        said = [word for word in words if word.partition("=")[0] in ref.options and "=" in word]
        given = {name: _value(value) for name, _, value in (word.partition("=") for word in said)}
        check_reading({kind: given})
        paths = _paths(" ".join(word for word in words if word not in said) if said else rest, f"/{kind}")
        read = [ref.from_path(path, **given).load(**talk.intake.loading(kind)) for path in paths]
        for path, value in zip(paths, read, strict=True):
            talk.attach_clip(kind, value)
            self._say(f"{path.name}, {' x '.join(map(str, value.shape))}, goes with the next question")

    def _answer(self, question: str, items: Sequence[str] = ()) -> None:
        def write(text: str) -> None:
            sys.stdout.write(_harmless(text) if self.interactive else text)
            sys.stdout.flush()

        reply = self.conversation.ask(question, write, items=items)
        if not reply.text.endswith("\n") and (reply.text or not items):
            write("\n")
        self._keep(reply)
        if reply.interrupted and not self.interactive:
            raise KeyboardInterrupt
        if reply.unfinished:
            self._say("it ended inside its thought: more --max-new-tokens, or --template enable_thinking=false")
        if self.interactive:
            speed = f"{reply.tokens} tokens, {reply.tokens / max(reply.seconds, 1e-9):.0f} per second"
            self._say(f"{'stopped; ' if reply.interrupted else ''}{speed}")

    def _greet(self) -> None:
        model = self.conversation.model
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        *most, last = [
            "text",
            *(medium.plural for name, medium in MEDIA.items() if name in self.conversation.intake.takes),
        ]
        takes = f"{', '.join(most)} and {last}" if most else last
        dtype = str(model.dtype).removeprefix("torch.")
        where = f"{dtype} on {model.device}"
        self.console.print(f"[bold]{type(model).__name__}[/bold], {millions:,.1f} M parameters, {where}; takes {takes}")
        self._say("/help lists the commands, Ctrl-D leaves")

    def _help(self) -> None:
        for usage, meaning in COMMANDS.items():
            self.console.print(f"  [bold]{escape(usage):<16}[/bold] {escape(meaning)}")

    def _say(self, text: str) -> None:
        self.console.print(f"[dim]{escape(visible(text))}[/dim]")

    def _complain(self, error: AlulaError) -> None:
        where = f"[bold]{escape(visible(error.where))}[/bold]: " if error.where else ""
        self.console.print(f"[bold red]error[/bold red] {where}{escape(visible(error.message))}")
        if error.remedy:
            self.console.print(f"[bold]remedy[/bold] {escape(visible(error.remedy))}")


def _unused(name: str, suffix: str) -> Path:
    """A file name in the working directory that nothing has."""
    numbers = itertools.count(1)
    return next(path for number in numbers if not (path := Path(f"{name}-{number}{suffix}")).exists())


def in_blocks(image: Image.Image, most: int = 60) -> str:
    """A small picture for a terminal: two pixels a character, the upper one its foreground, in 24-bit colors."""
    small = image.convert("RGB")
    small.thumbnail((most, most))
    pixels = np.array(small).astype(int)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        told = (";".join(map(str, [38, 2, *u, 48, 2, *v])) for u, v in zip(upper, lower, strict=True))
        lines.append("".join(f"\x1b[{colors}m\u2580" for colors in told) + "\x1b[0m")
    return "\n".join(lines) + "\n"


def _harmless(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _value(text: str) -> str | float:
    """A number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _paths(text: str, command: str = "/image") -> list[Path]:
    """The files a line names: one path with spaces as it stands, or several by the shell's quoting."""
    if not text:
        what = command.removeprefix("/")
        raise UsageError(f"which {what}?", where=command, remedy=f"{command} PATH, several paths allowed")
    # not Path.expanduser and Path.is_file, which raise for users that are not there and names that are too long
    if os.path.isfile(whole := os.path.expanduser(text)):
        return [Path(whole)]
    try:
        paths = [os.path.expanduser(word) for word in shlex.split(text)]
    except ValueError as error:
        raise UsageError(f"{error}: {text}", where=command) from error
    for path in paths:
        if not os.path.isfile(path):
            raise UsageError("no such file", where=path, remedy="check the path; quote one with spaces among several")
    return [Path(path) for path in paths]
