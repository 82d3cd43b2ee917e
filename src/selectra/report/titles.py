"""Names of files and classes, which people make as long as they like, in titles that have no room for that."""


def shortened(name: str, most: int, tail: bool = True) -> str:
    """A name of at most so many letters.

    Args:
        name: Of a file, a model or a class.
        most: Letters, the ellipsis with them.
        tail: Keep its end, too, where files have numbers; else its beginning alone.
    """
    if len(name) <= most:
        return name
    end = (most - 1) // 3 if tail else 0
    return f"{name[: most - 1 - end]}…{name[len(name) - end :]}"
