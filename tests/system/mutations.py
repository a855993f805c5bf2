"""Changes to valid input, drawn from a seeded generator: what disks, editors, programs and bad people do to files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, MutableMapping, MutableSequence
from copy import deepcopy
from random import Random
from typing import Any

BOM = b"\xef\xbb\xbf"
TOKENS = (
    b"\0", b"\n", b"\r", b"\r\n", b'"', b"'", b",", b";", b"\t", b"{", b"}", b"[", b"]", b":", b"NaN", b"-Infinity",
    b"1e999", b"null", b"true", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", BOM, b"-",
    b"9" * 40, b"9" * 5000, "\u202e\u2028\u00a0\U0001f512".encode(), b"../../../etc/passwd", b"<script>", b"=1+1",
    b"%s%n", b"\x1b[31m",
)  # fmt: skip


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """One to four changes to bytes, wherever they fall."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_BYTE_CHANGES)(data, rng)
    return data


def _place(data: bytes, rng: Random) -> int:
    return rng.randrange(len(data) + 1)


def _span(data: bytes, rng: Random, longest: int = 64) -> tuple[int, int]:
    start = _place(data, rng)
    return start, min(len(data), start + rng.randrange(1, longest))


def _flip(data: bytes, rng: Random) -> bytes:
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _cut(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 2, 200)) + data[end:]


def _insert(data: bytes, rng: Random) -> bytes:
    place = _place(data, rng)
    return data[:place] + rng.choice(TOKENS) + data[place:]


def _overwrite(data: bytes, rng: Random) -> bytes:
    start, end = _span(data, rng, 16)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def _long_field(data: bytes, rng: Random) -> bytes:
    place = _place(data, rng)
    return (
        data[:place] + rng.choice((b"A", b"[", b'{"a":', b" ", b"\xc3\xa9")) * rng.choice((300, 70_000)) + data[place:]
    )


_BYTE_CHANGES: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _repeat,
    _insert,
    _insert,
    _overwrite,
    _long_field,
    lambda data, rng: data[: _place(data, rng)],
    lambda data, rng: BOM + data,
    lambda data, rng: data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b""))),
    lambda data, rng: data[-_place(data, rng) :],
)


def mutate_text(text: str, rng: Random) -> str:
    """Changes to a short text: a name, a path, a part of an address."""
    data = mutate_bytes(text.encode("utf-8", "surrogatepass"), rng)
    return data.decode("utf-8", rng.choice(("replace", "ignore", "surrogateescape")))


# ---------------------------------------------------------------------------------------------------------------- JSON


def _deep(rng: Random) -> Any:
    value: Any = rng.choice(([], {}, 1))
    for _ in range(rng.choice((5, 70, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


_VALUES: tuple[Callable[[Random], Any], ...] = (
    lambda rng: None,
    lambda rng: rng.random() < 0.5,
    lambda rng: rng.choice((0, 1, -1, 2, 7, 99, 10**9, 2**31, 2**63, 10**18, -(10**18), 10**30)),
    lambda rng: rng.choice((0.0, -0.5, 0.5, 1.5, 1e-300, 1e300, -1e300)),
    lambda rng: rng.choice((float("nan"), float("inf"), float("-inf"))),
    lambda rng: rng.choice(("", " ", "1", "-1", "1.5", "none", "last", "all", "\0", "\n", "a\u202eb", "=1+1", "<b>")),
    lambda rng: rng.choice(("../../../etc/passwd", "/dev/zero", "~nobody-of-this-name/x", "a" * 50_000, "\ud800")),
    lambda rng: [],
    lambda rng: {},
    lambda rng: [rng.choice((1, "a", None, [], {}, 1.5))] * rng.choice((1, 3, 1000)),
    lambda rng: {rng.choice(("a", "", "value", "\0")): rng.choice((1, "a", None, []))},
    _deep,
)  # fmt: skip


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value: its container and its key."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        container = waiting.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def change_json(value: Any, rng: Random) -> Any:
    """A copy with one to three places changed; places high up come as often as the many deep ones."""
    value = deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = _nodes(value) if isinstance(value, (dict, list)) else []
        if not places or rng.random() < 0.02:
            value = rng.choice(_VALUES)(rng)
            continue
        high = places[: max(4, len(value))]
        container, key = rng.choice(high if rng.random() < 0.5 else places)
        if rng.random() < 0.1 and "format" in value:
            container, key = value, "format"
        _change_place(container, key, places, rng)
    return value


def _change_place(
    container: MutableMapping[Any, Any] | MutableSequence[Any], key: Any, places: Any, rng: Random
) -> None:
    kind = rng.randrange(8)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, MutableMapping):
        container[rng.choice(("", "a", str(key).upper(), f"{key} ", "digest"))] = container.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        container[key] = deepcopy(other[place]) if _is_there(other, place) else None
    elif kind == 3:
        container[key] = [container[key]] if rng.random() < 0.5 else str(container[key])[:1000]
    elif kind == 4 and isinstance(container[key], (int, float)):
        container[key] = container[key] * rng.choice((-1, 0, 2, 10**6, 10**12)) + rng.choice((0, 1, -1, 0.5))
    elif kind == 4 and isinstance(container[key], str):
        container[key] = mutate_text(container[key], rng)
    else:
        container[key] = rng.choice(_VALUES)(rng)


def _is_there(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def dump(value: Any, rng: Random) -> bytes:
    """As a program would write it that knows no better: NaN, doubled keys, another encoding, a BOM."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 1)))
    if rng.random() < 0.05 and text.startswith("{"):
        inner = change_json(value, rng)
        first = json.dumps(inner).strip()[1:-1] if isinstance(inner, dict) else ""
        text = "{" + first + ("," if first and len(value) else "") + text[1:]
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.03:
        data = rng.choice((BOM + data, text.encode("utf-16", "surrogatepass"), text.encode("utf-32", "surrogatepass")))
    return data


def mutate_json(value: Any, rng: Random) -> bytes:
    """A changed JSON value as bytes; every fifth changed as bytes instead."""
    if rng.random() < 0.2:
        return mutate_bytes(json.dumps(value).encode(), rng)
    return dump(change_json(value, rng), rng)


def mutate_lines(lines: list[Any], rng: Random) -> bytes:
    """JSON lines, some of them changed."""
    written = [json.dumps(line).encode() for line in lines]
    for _ in range(rng.choice((1, 2, 5))):
        place = rng.randrange(len(lines))
        written[place] = mutate_json(lines[place], rng).replace(b"\n", b" ")
    data = rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(written) + rng.choice((b"\n", b""))
    return mutate_bytes(data, rng) if rng.random() < 0.2 else data


# --------------------------------------------------------------------------------------------------------- safetensors


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """Bytes changed, or the header: other kinds, shapes and places of tensors, and lengths that lie."""
    if rng.random() < 0.35:
        return mutate_bytes(data, rng)
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]
    parsed = json.loads(header)
    if rng.random() < 0.5:
        names = [name for name in parsed if name != "__metadata__"]
        entry = parsed[rng.choice(names)]
        kind = rng.randrange(3)
        if kind == 0:
            entry["dtype"] = rng.choice(("BF16", "F8_E4M3", "F16", "F64", "I64", "U8", "BOOL", "C64", "X", ""))
        elif kind == 1:
            entry["shape"] = rng.choice(([], [0], [-1], [2**62, 4], [1] * 70, [10**12], entry["shape"][::-1]))
        else:
            entry["data_offsets"] = rng.choice(([0, 0], [0, 10**15], [4, 0], [-4, 4], [0, 4]))
        if rng.random() < 0.3:
            parsed[f"{rng.choice(names)}x"] = parsed.pop(rng.choice(names))
        header = json.dumps(parsed).encode()
    else:
        header = dump(change_json(parsed, rng), rng)
    length = rng.choice((len(header),) * 6 + (0, 1, len(header) + 1, 2**40, 2**63))
    return struct.pack("<Q", length) + header + body
