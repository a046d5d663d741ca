"""JSON objects and their values, checked as they are read."""

import reprlib
from typing import Any, NoReturn

import msgspec

from ..errors import ModelLoadError

__all__ = ["Values", "load_json", "refuse", "token_ids"]

MAX_FILE_BYTES = 16 << 20
MAX_TOKEN_ID = 2**31 - 1


_shown = reprlib.Repr()
_shown.maxstring = 80


class Values:
    """A configuration whose values are checked as they are read."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._present(key)
        if not isinstance(value, int) or isinstance(value, bool):
            refuse(key, value, "must be an integer")
        if not low <= value <= high:
            refuse(key, value, f"must lie in [{low}, {high}]")
        return value

    def real(self, key: str, low: float, high: float) -> float:
        value = self._present(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            refuse(key, value, "must be a number")
        if not low <= value <= high:  # Also false for NaN.
            refuse(key, value, f"must lie in [{low:g}, {high:g}]")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._present(key)
        if not isinstance(value, bool):
            refuse(key, value, "must be true or false")
        return value

    def _present(self, key: str) -> Any:
        value = self._values.get(key)
        if value is None:
            raise ModelLoadError(f"the model's configuration has no {key}")
        return value


def refuse(key: str, value: Any, rule: str) -> NoReturn:
    """Raises `ModelLoadError` for a configuration's value."""
    raise ModelLoadError(f"the model's configuration has {key}={_shown.repr(value)}; it {rule}")


def token_ids(value: Any) -> tuple[int, ...]:
    """Checks an id, a list of ids or None; repeated ids count once."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= MAX_TOKEN_ID:
            refuse("eos_token_id", value, "must be a token id, or a list of them")
    return tuple(dict.fromkeys(ids))


def load_json(path: str) -> dict[str, Any] | None:
    """A JSON object from a file, or None where there is no such file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ModelLoadError(f"{path} has more than {MAX_FILE_BYTES} bytes; it is not a configuration")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value
