"""Names, numbers and prose that tasks are generated from."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from random import Random

from dynamo_kvtc.errors import EvaluationError

__all__ = ["CATEGORIES", "draw_names", "draw_numbers", "draw_unlike_names", "sentences"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = _words(
    """
    amber ancient bitter blue brave bright broad calm clever cold copper crisp dark dry early fair fast
    gentle giant golden grand green happy heavy hidden humble icy jolly keen large late light little lonely
    loud lucky mild modern narrow noble pale plain proud quick quiet rapid red rich rough round royal rusty
    sharp short silent silver simple slow small soft solid steep sweet tall tiny warm white wild wise young
    """
)

_NOUNS = _words(
    """
    anchor apple arrow badger basket beacon bell bishop bottle branch bridge candle canyon castle cloud
    compass coral crown desert dolphin dragon eagle engine falcon feather forest fountain garden glacier
    hammer harbor hawk hill horse island jacket kettle kitchen ladder lantern lemon library lion market
    meadow mirror monkey mountain needle ocean orchard owl palace pencil piano pillow pirate planet pocket
    pony rabbit raven ribbon river rocket saddle sailor shadow spider stone storm table temple tiger tower
    train tunnel valley village violin wagon whale window winter wizard wolf
    """
)

#: Words by what they name; each word stands in one category only.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("dog", "cat", "horse", "cow", "sheep", "lion", "tiger", "rabbit", "wolf", "bear", "goat"),
    "fruit": ("apple", "banana", "pear", "cherry", "grape", "lemon", "peach", "plum", "mango", "melon"),
    "color": ("red", "blue", "green", "yellow", "purple", "brown", "black", "white", "pink", "gray"),
    "city": ("Paris", "London", "Berlin", "Madrid", "Rome", "Tokyo", "Vienna", "Moscow", "Dublin", "Athens"),
    "tool": ("hammer", "saw", "drill", "wrench", "shovel", "axe", "chisel", "pliers", "screwdriver", "rake"),
    "metal": ("iron", "copper", "silver", "gold", "zinc", "nickel", "lead", "tin", "steel", "aluminum"),
}


def draw_names(count: int, random: Random) -> list[str]:
    """Return different names of two words, such as ``quiet harbor``.

    Raises
    ------
    EvaluationError
        If more are wanted than there are.
    """
    known = len(_ADJECTIVES) * len(_NOUNS)
    if count > known:
        raise EvaluationError(f"{count} names are wanted, there are {known}; use shorter contexts")
    return [
        f"{_ADJECTIVES[number // len(_NOUNS)]} {_NOUNS[number % len(_NOUNS)]}"
        for number in random.sample(range(known), count)
    ]


def draw_unlike_names(count: int, random: Random) -> list[str]:
    """Return names of two words that share no word.

    Raises
    ------
    EvaluationError
        If more are wanted than there are.
    """
    known = min(len(_ADJECTIVES), len(_NOUNS))
    if count > known:
        raise EvaluationError(f"{count} names without a common word are wanted, there are {known}")
    pairs = zip(random.sample(_ADJECTIVES, count), random.sample(_NOUNS, count), strict=True)
    return [f"{adjective} {noun}" for adjective, noun in pairs]


def draw_numbers(count: int, random: Random) -> list[str]:
    """Return different numbers of five digits."""
    return [str(number) for number in random.sample(range(10_000, 100_000), count)]


@cache
def sentences(path: Path) -> tuple[str, ...]:
    """Return the sentences of a text file, each with the space or line end behind it."""
    text = path.read_text(encoding="utf-8")
    return tuple(re.findall(r"\S[^.!?]*[.!?]+[\"')\]]*\s+", text))
