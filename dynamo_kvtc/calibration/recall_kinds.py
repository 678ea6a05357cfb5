"""The kinds of record that recall documents state: how facts are drawn, written and referred to.

They are not those that the evaluation asks for (`benchmarks.quality.tasks`): there are no lists of keys and
values, no hidden sentences and no chains of references, no word of theirs and no number of five digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

__all__ = ["KINDS", "Kind"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST_NAMES = _words(
    """
    Adaeze Alarik Amara Anselm Aurelie Bartosz Beatriz Bjarne Camille Casimir Chiara Damir Delphine
    Eirik Elif Emeka Farida Fenna Gaspard Giulia Hakan Henrike Ilse Imani Ivo Jadwiga Jorrit Kaia
    Katarzyna Lazlo Leocadia Liv Marit Mateus Mirjam Nadia Nikolai Noor Oksana Orsolya Paloma Piotr
    Quirin Rahel Renske Rui Sanne Selma Soren Tamsin Teun Ulrike Valentin Veerle Wanjiru Xenia Yannick
    Yuki Zoltan Zuzana
    """
)

_SURNAMES = _words(
    """
    Abara Adler Bakker Bandara Castellan Cisse Dahlgren Dubois Eklund Esposito Ferreira Fischer Gallo
    Grabowski Haddad Hoekstra Ibarra Ivanova Jansen Jovanovic Kaplan Kowalska Lindqvist Lombardi
    Marchetti Moreau Nakamura Novak Okafor Olsen Petrov Quintana Rahimi Ricci Sandoval Szabo Takahashi
    Tessier Ueda Urbano Vasquez Verhoeven Wagner Weber Xu Yilmaz Zapata Zeller
    """
)

_PLACES = _words(
    """
    Aarhus Basel Bergen Bilbao Bologna Bremen Cork Delft Gdansk Ghent Graz Izmir Kyoto Leeds Leipzig
    Linz Lyon Malmo Nantes Oporto Osaka Ostrava Perth Quito Riga Salzburg Split Tallinn Tampere Turin
    Utrecht Vilnius Zagreb
    """
)

_PARTS = _words(
    """
    actuator bearing bracket bushing clamp coupler diode fuse gasket gearbox grommet impeller inverter
    manifold nozzle relay resistor rotor sensor sleeve solenoid spindle sprocket stator thermostat
    transformer valve washer
    """
)

_GRADES = _words(
    """
    anodised braced ceramic ducted flanged galvanised hardened insulated knurled laminated sealed vented
    """
)

_MODULES = _words(
    """
    auth batch billing cluster digest exporter gateway indexer ingest ledger mailer metrics notifier
    parser planner quota reaper replica router sampler scheduler session shard spooler tracer uploader
    """
)

_SETTINGS = _words(
    """
    backlog_limit backoff_ms batch_rows burst_size drain_wait fanout flush_ms grace_secs heap_mb hold_ms
    idle_secs lease_secs max_inflight page_rows poll_ms probe_secs queue_depth retry_cap scan_rows
    spill_mb ttl_secs
    """
)

_STATES = _words(
    """
    accepted archived blocked deferred dropped escalated expired merged paused queued rejected resumed
    """
)

_CONSTANTS = _words(
    """
    BANK BAUD CALIBRATION CARRIER CHANNEL CLOCK COUNTER DECODER DIVIDER FRAME GUARD HEADER LATCH MASK
    OFFSET PARITY PREAMBLE REGISTER SAMPLE SECTOR SHIFT STROBE SYNC TIMER TRIGGER VECTOR
    """
)

_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_Draw = Callable[[Random], str]


def _digits(count: int) -> _Draw:
    return lambda random: str(random.randrange(10 ** (count - 1), 10**count))


def _hex(count: int) -> _Draw:
    return lambda random: "".join(random.choices("0123456789abcdef", k=count))


def _code(letters: int, digits: int, separator: str = "-") -> _Draw:
    def draw(random: Random) -> str:
        return (
            "".join(random.choices("ABCDEFGHJKLMNPRSTUVWXYZ", k=letters))
            + separator
            + _digits(digits)(random)
        )

    return draw


def _word(words: tuple[str, ...]) -> _Draw:
    return lambda random: random.choice(words)


def _joined(separator: str, *parts: _Draw) -> _Draw:
    return lambda random: separator.join(part(random) for part in parts)


def _money(random: Random) -> str:
    return f"{random.randrange(11, 999)}.{random.randrange(100):02}"


def _time(random: Random) -> str:
    return f"{random.randrange(24):02}:{random.randrange(60):02}"


_PERSON = _joined(" ", _word(_FIRST_NAMES), _word(_SURNAMES))


@dataclass(frozen=True)
class Kind:
    """A kind of record: what it consists of, how it is stated and how it is referred to.

    Attributes
    ----------
    fields : Mapping[str, Callable[[Random], str]]
        Draws each field. The first one names a record; no two of a document share it.
    opening, fact, closing : str
        A block of records: what stands before them, a line for each with fields in braces, what stands after.
    references : tuple[tuple[str, str, str], ...]
        Ways of referring back: what stands before, a line for each record, what stands after.
    """

    fields: Mapping[str, _Draw]
    opening: str
    fact: str
    closing: str
    references: tuple[tuple[str, str, str], ...]

    def records(self, random: Random) -> Iterator[dict[str, str]]:
        """Yield records without end, as long as names can be found for them."""
        named = next(iter(self.fields))
        taken: set[str] = set()
        for _ in range(100_000):
            record = {name: draw(random) for name, draw in self.fields.items()}
            if record[named] not in taken:
                taken.add(record[named])
                yield record


#: The kinds by name.
KINDS: dict[str, Kind] = {
    "directory": Kind(
        {"name": _PERSON, "extension": _digits(4), "room": _code(1, 3, "")},
        "Staff directory\n===============\n",
        "{name}, ext. {extension}, room {room}\n",
        "\n",
        (
            (
                "Questions about the directory\n\n",
                "Q: Which extension does {name} have?\nA: {extension}\n",
                "\n",
            ),
            ("Rooms, as given in the directory:\n", "- room {room} is that of {name}\n", "\n"),
            ("Calls to be returned today:\n", "* {name} (room {room}), call {extension}\n", "\n"),
        ),
    ),
    "settings": Kind(
        {
            "option": _joined(".", _word(_MODULES), _word(_SETTINGS)),
            "value": lambda random: _digits(random.choice((2, 3, 4, 6)))(random),
            "owner": _word(_SURNAMES),
        },
        "# service.conf, as deployed\n",
        "{option} = {value}  # set by {owner}\n",
        "\n",
        (
            ("$ confctl get (values from service.conf)\n", "$ confctl get {option}\n{value}\n", "\n"),
            ("Review of service.conf:\n", "{owner} chose {value} for {option}.\n", "\n"),
            ("def test_deployed_settings(conf):\n", '    assert conf["{option}"] == {value}\n', "\n\n"),
        ),
    ),
    "stock": Kind(
        {
            "item": _joined(" ", _word(_GRADES), _word(_PARTS)),
            "sku": _code(2, 4),
            "count": _digits(3),
            "bay": _code(1, 2, ""),
        },
        "| item | SKU | in stock | bay |\n|---|---|---|---|\n",
        "| {item} | {sku} | {count} | {bay} |\n",
        "\n",
        (
            (
                "The same stock by SKU:\n\n| SKU | bay | item |\n|---|---|---|\n",
                "| {sku} | {bay} | {item} |\n",
                "\n",
            ),
            ("Picking list:\n", "[ ] {item}: go to bay {bay}, scan {sku}\n", "\n"),
            ("Counted again, no differences:\n", "{item}: {count}\n", "\n"),
        ),
    ),
    "log": Kind(
        {
            "ticket": _hex(6),
            "time": _time,
            "host": _joined("-", _word(_MODULES), _digits(2)),
            "user": _word(_SURNAMES),
            "state": _word(_STATES),
        },
        "",
        "{time} {host} INFO ticket={ticket} user={user} state={state}\n",
        "\n",
        (
            ("What became of the tickets in this log?\n", "{ticket}: {state}, reported by {user}\n", "\n"),
            ("grep of the log, by host\n", "$ grep {ticket} service.log | cut -d' ' -f2\n{host}\n", "\n"),
            ("Timeline:\n", "At {time} ticket {ticket} of {user} was {state}.\n", "\n"),
        ),
    ),
    "csv": Kind(
        {"badge": _code(1, 4), "holder": _PERSON, "locker": _digits(3), "site": _word(_PLACES)},
        "badge,holder,locker,site\n",
        "{badge},{holder},{locker},{site}\n",
        "\n",
        (
            (
                "-- the lines above were loaded as badges\n",
                "SELECT locker, site FROM badges WHERE badge = '{badge}';\n-- {locker}, {site}\n",
                "\n",
            ),
            ("holder;badge\n", "{holder};{badge}\n", "\n"),
            ("Keys handed out:\n", "Locker {locker} in {site} belongs to {holder}.\n", "\n"),
        ),
    ),
    "json": Kind(
        {
            "order": _code(2, 6, ""),
            "client": _word(_SURNAMES),
            "total": _money,
            "port": _word(_PLACES),
        },
        '{{"orders": [\n',
        '  {{"order": "{order}", "client": "{client}", "total": {total}, "port": "{port}"}},\n',
        "]}}\n\n",
        (
            (
                "Totals of the orders, others left out:\n",
                '[{{"total": {total}, "order": "{order}"}}]\n',
                "\n",
            ),
            ("Notes on shipping\n", "Order {order} for {client} leaves from {port}.\n", "\n"),
            ("Invoices\n", "To {client}: order {order}, please pay {total} euros.\n", "\n"),
        ),
    ),
    "code": Kind(
        {
            "constant": _joined("_", _word(_CONSTANTS), _word(_CONSTANTS), _digits(1)),
            "value": _hex(4),
            "line": _digits(3),
        },
        "/* registers.h */\n",
        "#define {constant} 0x{value} /* line {line} of the data sheet */\n",
        "\n",
        (
            ("/* expanded by the preprocessor */\n", "static_assert({constant} == 0x{value});\n", "\n"),
            (
                "(gdb) print the constants of registers.h\n",
                "(gdb) p/x {constant}\n$1 = 0x{value}\n",
                "\n",
            ),
            ("Where the data sheet defines them:\n", "{constant} (0x{value}): line {line}\n", "\n"),
        ),
    ),
    "letters": Kind(
        {
            "person": _PERSON,
            "place": _word(_PLACES),
            "day": _word(_DAYS),
            "receipt": _digits(7),
            "fee": _money,
        },
        "Parcels of the week. ",
        "{person} sent one to {place} on {day}, receipt {receipt}, for {fee} euros. ",
        "\n\n",
        (
            (
                "Who asked at the counter, and what we told them.\n",
                "{person} had lost the receipt; it was number {receipt}.\n",
                "\n",
            ),
            (
                "Q & A\n",
                "Q: Where did the parcel of {person} go, and when?\nA: To {place}, on {day}.\n",
                "\n",
            ),
            ("Accounts\n", "{receipt}  {fee}  ({person})\n", "\n"),
        ),
    ),
}
