"""Long documents to talk about, from the held-out text that the package carries."""

from __future__ import annotations

from pathlib import Path

_TEXT = Path(__file__).parents[2] / "dynamo_kvtc" / "data" / "text"

Messages = list[dict[str, str]]


def document(index: int, *, characters: int = 5500, kind: str = "prose") -> str:
    """Return a piece of held-out text, some 1,300 tokens; different indices never overlap."""
    text = (_TEXT / f"{kind}-heldout.txt").read_text()
    start = index * characters
    piece = text[start : start + characters]
    assert len(piece) == characters, f"there is no document {index}"
    return piece


def first_turn(index: int) -> Messages:
    """Return a conversation's opening: a document and a question about it."""
    question = "Read this text.\n\n" + document(index) + "\n\nWho or what is this text about?"
    return [{"role": "user", "content": question}]


def next_turn(messages: Messages, answer: str, question: str = "Tell me more about it.") -> Messages:
    """Return the conversation with its answer and a next question."""
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]
