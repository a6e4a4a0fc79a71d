"""What the example shop sells, who its customers are, what they write, and what goes wrong with it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

HOUR = 3_600_000

CATALOGUE: dict[int, tuple[str, float]] = {  # id: name, price; the first three are the original text's
    1: ("Orange", 0.5),
    2: ("Banana", 1.22),
    3: ("Lemon", 5),
    4: ("Äpfel, rot", 2.49),
    5: ("Pear", 0.75),
    6: ("Jalapeño", 1.1),
    7: ("Tomatoes on the vine", 2.99),
    8: ("Crème fraîche", 1.79),
    9: ("Gruyère", 6.4),
    10: ("Sourdough loaf", 4.2),
    11: ("Bœuf bourguignon", 11.9),
    12: ("Smörgåsknäcke", 3.15),
    13: ("Müsli", 4.75),
    14: ("Oat milk", 1.95),
    15: ("Free-range eggs", 3.6),
    16: ("Żurek", 3.3),
    17: ("Olive oil", 9.99),
    18: ("Sea salt", 2),
    19: ("Black pepper", 3.25),
    20: ("抹茶", 14.5),
    21: ("Café de Colombia", 8.9),
    22: ("Earl Grey", 5.25),
    23: ("Dark chocolate", 2.85),
    24: ("Lakritz", 1.6),
    25: ("Honey", 6.75),
    26: ("Açaí bowl", 7.3),
    27: ("Kimchi 김치", 5.8),
    28: ("Basmati rice", 4.1),
    29: ("Spaghetti N° 5", 1.49),
    30: ("Tinned sardines", 2.3),
    31: ("Smoked salmon", 8.45),
    32: ("Hummus", 2.75),
    33: ("Pita bread", 1.85),
    34: ("Ginger beer", 2.1),
    35: ("Mineral water", 0.69),
    36: ("Wine, Grüner Veltliner", 10.5),
    37: ("Dish soap", 1.99),
    38: ("Beeswax candle", 12),
    39: ("Enamel mug", 9.5),
    40: ("Picnic hamper", 49),
}

ITEM_IDS = list(CATALOGUE)

# How busy each hour of the day is (UTC); the mean is 1.
HOURS = (
    0.3, 0.2, 0.1, 0.1, 0.1, 0.2, 0.5, 0.8, 1, 1.1, 1.2, 1.4,
    1.7, 1.4, 1.1, 1.1, 1.2, 1.4, 1.6, 1.9, 2.1, 1.9, 1.1, 0.5,
)  # fmt: skip

OPENINGS = (
    "Bought the {name} for a dinner with friends.",
    "Second time that I order {name} here.",
    "The {name} arrived a day early and well packed.",
    "My daughter asked for {name}, so we tried it.",
    "I was not sure about {name} at first.",
    "We have been buying {name} every week since spring.",
    "{name} was on offer, hard to say no.",
    "A neighbour told me about the {name}.",
)
MIDDLES = (
    "It tastes just as I remember it from my holidays.",
    "Good quality for what it costs.",
    "It kept fresh for the whole week.",
    "The packaging could do with less plastic.",
    "Everybody at the table wanted more of it.",
    "It was a little smaller than in the picture.",
    "Nothing special, but there is nothing wrong with it either.",
    "The courier was friendly and carried it up to the third floor.",
)
ENDINGS = (
    "Will buy again.",
    "Four stars from me.",
    "Recommended!",
    "Next time I will take two.",
    "I would like to see a bigger size.",
    "Thank you, and keep it up.",
    "Not sure that I will order it again.",
    "Perfect with a glass of wine.",
)

FIRST_NAMES = (
    "ada", "ben", "carla", "daniel", "elif", "femi", "greta", "hugo", "ines", "jonas", "keiko", "liam",
    "maria", "nadia", "oscar", "paula", "quentin", "rosa", "sven", "tara", "umar", "vera", "wanda", "yusuf",
)  # fmt: skip
LAST_NAMES = (
    "adler", "baker", "costa", "dubois", "eriksen", "fischer", "garcia", "hansen", "ito", "jansen", "keller",
    "lopez", "moreau", "novak", "okafor", "price", "quinn", "rossi", "sato", "tanaka", "urban", "weber",
)  # fmt: skip

GARBAGE = (
    b'{"subject": {"id": 7}, "verb": "STARTED_BRO',
    b"<html><head><title>502 Bad Gateway</title></head></html>",
    b"\xff\xfe\x00\x00\x1f\x8b\x08",
    b"Traceback (most recent call last):",
    b"null",
)

SPOILT = ("cut", "garbage", "boolean id", "no verb", "no item id")

ODD_REVIEWS = 0.03  # of all reviews


@dataclass
class Shopper:
    """A customer: habits, which hang on the id alone, and a basket, which survives from visit to visit."""

    id: int
    visits_a_day: float
    peak: int  # the hour of the day that suits best
    favourites: list[int]
    buys: float  # how often a visit with a full basket ends in an order
    mobile: bool
    skew: int  # how far the device's clock is ahead, in milliseconds
    basket: dict[int, int] = field(default_factory=dict)


def make_shoppers(customers: int) -> list[Shopper]:
    """So many customers, from id 101 on, with empty baskets."""
    return [_shopper(id) for id in range(101, 101 + customers)]


def _shopper(id: int) -> Shopper:
    rng = random.Random(f"shopper {id}")
    return Shopper(
        id=id,
        visits_a_day=rng.lognormvariate(-0.45, 0.5),
        peak=rng.choices(range(24), HOURS)[0],
        favourites=rng.sample(ITEM_IDS, 8),
        buys=rng.uniform(0.4, 0.9),
        mobile=rng.random() < 0.4,
        skew=rng.randint(500, 4000) if rng.random() < 0.03 else 0,
    )


def visit_starts(rng: random.Random, shopper: Shopper, begin: int, end: int) -> Iterator[int]:
    """When the customer comes, in milliseconds: most in the shop's busy hours and around the own peak."""
    for start in range(begin, end, HOUR):
        hour = start // HOUR % 24
        from_peak = min((hour - shopper.peak) % 24, (shopper.peak - hour) % 24)
        chance = shopper.visits_a_day / 24 * HOURS[hour] * (2.5 if from_peak <= 2 else 0.6)
        if rng.random() < chance:
            yield start + rng.randrange(HOUR)


def wire_item(id: int, count: int | None = None) -> dict[str, Any]:
    """An item as the wire has it, with its count where one is given."""
    name, price = CATALOGUE[id]
    wire = {"id": id, "name": name, "price": price}
    return wire if count is None else {**wire, "count": count}


def write_email(rng: random.Random, id: int) -> str:
    """An address that nobody else has, at a domain that receives no mail."""
    name = f"{rng.choice(FIRST_NAMES)}.{rng.choice(LAST_NAMES)}.{id}"
    return f"{name}@example.{rng.choice(('com', 'org', 'net'))}"


def write_review(rng: random.Random, item: int) -> str:
    """A few sentences about the item; now and then shouted, repeated, very long or full of digits."""
    name = CATALOGUE[item][0]
    parts = [rng.choice(OPENINGS), *rng.sample(MIDDLES, rng.randint(0, 2)), rng.choice(ENDINGS)]
    text = " ".join(parts).format(name=name)
    if rng.random() >= ODD_REVIEWS:
        return text
    odd = (
        text.upper().replace(".", "!!!!"),
        " ".join([rng.choice(("good", "bad", "fresh", name))] * rng.randint(40, 120)),
        " ".join(rng.choices((*MIDDLES, *ENDINGS), k=rng.randint(40, 90))),
        " ".join(str(rng.randrange(10**9)) for _ in range(rng.randint(8, 20))),
    )
    return rng.choice(odd)


def write_tax_return(rng: random.Random) -> str:
    """The body of a SUBMIT_TAX, now and then the original text's."""
    if rng.random() < 0.2:
        return "SCHEMALESS-SERIALIZED-DATA"
    net = rng.randint(200_00, 90_000_00)
    return f"VAT RETURN;QUARTER={rng.randint(1, 4)};NET={net / 100:.2f};DUE={net / 500:.2f}"


def spoil(rng: random.Random, event: dict[str, Any], kind: str) -> bytes:
    """A bad line of that kind, one of `SPOILT`."""
    if kind == "garbage":
        return rng.choice(GARBAGE)
    if kind == "cut":
        line = orjson.dumps(event)
        return line[: rng.randrange(1, len(line))]
    if kind == "boolean id":
        return orjson.dumps({**event, "subject": {**event["subject"], "id": True}})
    if kind == "no verb":
        return orjson.dumps({name: value for name, value in event.items() if name != "verb"})
    nameless = {"type": "ITEM", "item": {"name": "Orange", "price": 0.5, "count": 1}}
    return orjson.dumps({**event, "verb": {"type": "ADDED_ITEM_TO_BASKET"}, "object": nameless})
