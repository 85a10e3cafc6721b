"""Records of invented persons, one JSON object each: the demo's `records` domain.

The fields depend on each other, so that there is something to learn: the country depends on the
city, the mail address on name and city, the initials in the number on the name.
"""

import json
import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_SYLLABLES = _words(
    "al an bar bel cor dan el fen gar hal ir jo kel lin mar nor ol per ros "
    "sa tor ul ven wil yar zan"
)
_CITIES = {
    "Arvelund": ("Norrin", 11),
    "Bostrava": ("Norrin", 12),
    "Calderon": ("Sulmara", 21),
    "Dunmerry": ("Ostrel", 31),
    "Eskhaven": ("Norrin", 13),
    "Felmora": ("Sulmara", 22),
    "Grantow": ("Ostrel", 32),
    "Hallisport": ("Ostrel", 33),
    "Ilmenau": ("Vesk", 41),
    "Jorvath": ("Vesk", 42),
    "Karmenta": ("Sulmara", 23),
    "Lysbrook": ("Ostrel", 34),
}
_JOBS = {
    "baker": "crafts",
    "carpenter": "crafts",
    "weaver": "crafts",
    "surgeon": "health",
    "nurse": "health",
    "dentist": "health",
    "pilot": "transport",
    "sailor": "transport",
    "driver": "transport",
    "teacher": "school",
    "librarian": "school",
    "tutor": "school",
}
_LANGUAGES = {"Norrin": "norric", "Sulmara": "sulmaran", "Ostrel": "ostrelian", "Vesk": "veskish"}


def person_record(rng: random.Random) -> str:
    """Generate one person as a line of JSON."""
    first, last = _name(rng), _name(rng)
    city = rng.choice(tuple(_CITIES))
    country, prefix = _CITIES[city]
    job = rng.choice(tuple(_JOBS))
    number = f"{first[0]}{last[0]}-{prefix}{rng.randint(100, 999)}"
    record = {
        "id": number,
        "name": f"{first} {last}",
        "born": f"{rng.randint(1940, 2005)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "city": city,
        "country": country,
        "language": _LANGUAGES[country],
        "job": job,
        "sector": _JOBS[job],
        "mail": f"{first}.{last}@{city}.example".lower(),
    }
    return json.dumps(record) + "\n"


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).capitalize()
