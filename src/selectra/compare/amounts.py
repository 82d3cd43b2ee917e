"""Numbers as people write them."""

from selectra.errors import ConfigError

# A letter after a number of parameters or FLOPs.
LETTERS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}


def amount_of(text: str) -> float:
    """A number as people write it: "5M", "300k", "1.2e9".

    Raises:
        ConfigError: It is none.
    """
    letter = text[-1:].lower()
    digits, factor = (text[:-1], LETTERS[letter]) if letter in LETTERS else (text, 1.0)
    try:
        value = float(digits) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"'{text}' is no amount; write 5M, 300k or 1.2e6.")
    return value
