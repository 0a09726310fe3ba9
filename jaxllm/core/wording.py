"""Numbers in the sentences that a person reads."""


def count(number: int, noun: str) -> str:
    """Return "1 row" or "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(number: float) -> str:
    """Return a number in a readable unit: 640, 12.8k, 3.4M, 6.7B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,.0f}"
