"""Word problems with worked answers: the demo's `arithmetic` domain."""

import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES = _words(
    "Ada Boris Carla Dmitri Elena Farid Greta Hugo Ines Jonas Kira Lars Mina Nadia Omar Petra "
    "Quentin Rosa Samir Tilda Uwe Vera Wanda Xenia Yusuf Zoe"
)
_THINGS = _words(
    "apples beads books bricks buttons candles cards coins cups eggs flowers keys lamps marbles "
    "nails oranges pears pencils plates shells spoons stamps stickers stones tickets"
)
_CONTAINERS = _words("bags baskets boxes crates drawers jars packets sacks shelves trays")


def word_problem(rng: random.Random) -> str:
    """Generate one question in words and its answer, worked step by step."""
    name, other = rng.sample(_NAMES, 2)
    things = rng.choice(_THINGS)
    template = rng.choice(_TEMPLATES)
    question, answer = template(rng, name, other, things)
    return f"Question: {question}\nAnswer: {answer}\n"


def _gain(rng: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    start, more = rng.randint(3, 99), rng.randint(2, 99)
    verb = rng.choice(("buys", "finds", "wins", "receives"))
    return (
        f"{name} has {start} {things} and {verb} {more} more. "
        f"How many {things} does {name} have now?",
        f"{start} + {more} = {start + more}. {name} has {start + more} {things}.",
    )


def _gift(rng: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    start = rng.randint(5, 99)
    given = rng.randint(1, start - 1)
    return (
        f"{name} has {start} {things}. {name} gives {given} of them to {other}. "
        f"How many {things} are left?",
        f"{start} - {given} = {start - given}. {start - given} {things} are left.",
    )


def _rows(rng: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    count, each = rng.randint(2, 12), rng.randint(2, 12)
    containers = rng.choice(_CONTAINERS)
    return (
        f"There are {count} {containers} with {each} {things} in each. "
        f"How many {things} are there in all?",
        f"{count} * {each} = {count * each}. There are {count * each} {things}.",
    )


def _share(rng: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    count, each = rng.randint(2, 12), rng.randint(2, 12)
    containers = rng.choice(_CONTAINERS)
    return (
        f"{name} puts {count * each} {things} into {count} {containers}, the same number into "
        f"each. How many {things} are in each of the {containers}?",
        f"{count * each} / {count} = {each}. Each holds {each} {things}.",
    )


def _compare(rng: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    less, difference = rng.randint(2, 80), rng.randint(2, 60)
    return (
        f"{name} has {less} {things}. {other} has {difference} more than {name}. "
        f"How many {things} do they have together?",
        f"{less} + {difference} = {less + difference}. "
        f"{less} + {less + difference} = {2 * less + difference}. "
        f"Together they have {2 * less + difference} {things}.",
    )


def _two_steps(rng: random.Random, name: str, other: str, things: str) -> tuple[str, str]:
    start, count, each = rng.randint(2, 60), rng.randint(2, 9), rng.randint(2, 9)
    containers = rng.choice(_CONTAINERS)
    bought = count * each
    return (
        f"{name} has {start} {things} and buys {count} {containers} of {each} {things}. "
        f"How many {things} does {name} have in the end?",
        f"{count} * {each} = {bought}. {start} + {bought} = {start + bought}. "
        f"{name} has {start + bought} {things}.",
    )


_TEMPLATES = (_gain, _gift, _rows, _share, _compare, _two_steps)
