"""JSON from files: ambiguous and unbounded content is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from typing import Any

_MOST_LEVELS = 32
_MOST_DIGITS = 32


def parse_json(text: str | bytes, *, finite: bool = True, largest: int | None = None) -> Any:
    """Parse JSON of unique keys, short numbers and at most 32 levels.

    Args:
        text: the JSON text.
        finite: refuse NaN and infinity.
        largest: the largest magnitude of a whole number; None for any.

    Raises:
        ValueError: the text is not such JSON.

    Example:
        >>> parse_json('{"steps": 600}')
        {'steps': 600}
    """
    number = partial(_number, finite=finite, largest=largest)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=number,
            parse_float=number,
            parse_int=number,
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_levels(value, _MOST_LEVELS)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        twin = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twin!r} stands in it twice")
    return mapping


def _number(text: str, finite: bool, largest: int | None) -> int | float:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number in it has more than {_MOST_DIGITS} characters")
    if text.lstrip("-").isdigit():
        whole = int(text)
        if largest is not None and abs(whole) > largest:
            raise ValueError(f"the number {text} in it is larger than {largest:,}")
        return whole
    value = float(text)
    if finite and not math.isfinite(value):
        raise ValueError(f"{text} in it is not a finite number")
    return value


def _check_levels(value: Any, left: int) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_levels(inner, left - 1)
