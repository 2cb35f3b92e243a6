"""Text before it is tokens."""

from __future__ import annotations

from dataclasses import dataclass

from billhook.plan.errors import InputError

FRONT = 0.8  # the share of a source that may be calibrated on; the rest is for evaluation
LIMIT = 16 * 2**20  # characters read of one source: millions of tokens, more than any pass here takes


@dataclass(frozen=True)
class Text:
    """A named text in parts (lines or documents) whose concatenation is the text."""

    name: str
    parts: tuple[str, ...]

    @property
    def content(self) -> str:
        return "".join(self.parts)

    def split(self) -> tuple[Text, Text]:
        """The first 80% of the characters and the last 20%, cut between two parts (in a text of a single part: between
        two words)."""
        parts = self.parts if len(self.parts) > 1 else tuple(word + " " for word in self.content.split(" "))
        aim, done, cut = FRONT * sum(map(len, parts)), 0, 0
        while cut < len(parts) - 1 and done + len(parts[cut]) / 2 < aim:
            done += len(parts[cut])
            cut += 1
        if cut == 0:
            raise InputError(
                f"text {self.name} is too short to be split into a part to calibrate and one to evaluate on"
            )
        return Text(f"{self.name}, first 80%", parts[:cut]), Text(f"{self.name}, last 20%", parts[cut:])
