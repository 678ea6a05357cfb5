"""Target ``config``: configuration files and environment overrides."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.fuzz.target import Violation, damage, scratch_folder
from dynamo_kvtc.config.load import ENV_PREFIX, check_config

__all__ = ["ConfigTarget"]

_CONFIGS = Path(__file__).parents[2] / "configs"

#: What YAML readers stumble over.
_PIECES = ("!!int ''", "!!float ''", "!!timestamp x", "!!binary 'a'", "!!python/object:os.system x",
           "&a [*a]", "*a", "<<: {}",
           "? [a, b]\n: c", "{", "}", "[", "]", "- - - -", "!!set {a}", "!!omap [a]", "!!pairs [a: 1]",
           "!!bool ''", "!!null x",
           "2026-13-45", "2026-02-30 25:61:61", "0x", "0b", "0o8", "1:60:60", ".inf", ".nan", "-.inf",
           "1e999", "9" * 5000,
           "-1", "0", "'", '"', "\"\\x\"", "\"\\ud800\"", "\x00", "\x85", "\u2028", "\ufeff", "\t", "|",
           ">", "---", "...", "%YAML 9.9", "# x",
           "12GiB", "-4GiB", "1e30GiB", "99999999999999999999TiB", "5s", "-1s", "nan s", "infs", "~",
           "yes", "null", "é", "=",
           "[" * 200, "{a: " * 100, "{}: 1", "[]: 1", "!!str", "! x", "disk", "host")  # fmt: skip
_VARIABLES = ("CODEC__RATIO", "TIERS__0__CAPACITY", "TIERS__99__CAPACITY", "TIERS__-1__KIND", "TIERS", "",
              "__", "CODEC",
              "SECURITY__SALT", "POLICY__SINK_TOKENS", "X__Y__Z", "TIERS__0", "TIERS__٣__KIND",
              "CODEC__RATIO__X")  # fmt: skip


class ConfigCase(NamedTuple):
    """A mutated file and environment."""

    text: bytes
    env: dict[str, str]


class ConfigTarget:
    """Mutates the shipped configurations, line by line, value by value and byte by byte."""

    name = "config"

    def __init__(self) -> None:
        self._golden = [path.read_text(encoding="utf-8") for path in sorted(_CONFIGS.glob("*.yaml"))]
        self._path = scratch_folder(self) / "config.yaml"

    def make(self, random: Random) -> ConfigCase:
        """Return a text with one to three changes, at times with an environment."""
        lines = random.choice(self._golden).splitlines()
        # Short files are read faster, and comments say nothing.
        lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")][:30]
        for _ in range(random.choice((1, 1, 2, 3))):
            act, place = random.randrange(6), random.randrange(len(lines))
            key, _, _ = lines[place].partition(":")
            if act <= 2:
                lines[place] = f"{key}: {random.choice(_PIECES)}"
            elif act == 3:
                lines.insert(place, random.choice(lines) if random.random() < 0.5 else random.choice(_PIECES))
            elif act == 4:
                lines[place] = " " * random.randrange(5) + lines[place].lstrip()
            elif len(lines) > 1:
                del lines[place]
        text = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
        if random.random() < 0.2:
            damage(random, text, random.choice(self._golden).encode())
        env = {}
        if random.random() < 0.2:
            env[ENV_PREFIX + random.choice(_VARIABLES)] = random.choice(_PIECES)
        return ConfigCase(bytes(text), env)

    def judge(self, case: ConfigCase) -> str:
        """Read it: settings, or problems that say something."""
        self._path.write_bytes(case.text)
        config, problems = check_config(self._path, case.env)
        if config is not None:
            return "accepted"
        if not problems or not all(str(problem).strip() for problem in problems):
            raise Violation("a configuration was refused without a reason")
        return "ConfigError"

    def bound(self, case: ConfigCase) -> int:
        """Allow what a YAML parser takes for each byte."""
        return (8 << 20) + 4096 * len(case.text)
