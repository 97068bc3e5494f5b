"""safetensors files as bytes: equal content gives equal bytes, and what is read is checked."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from sefi_fast.utils.strict_json import parse_json

_HEADER_LIMIT = 4 * 2**20


def pack_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, checksum: bool = False
) -> bytes:
    """Return a safetensors file; the same content gives the same bytes.

    Args:
        tensors: tensors by name, on any device.
        metadata: text by name.
        checksum: add a CRC-32 of all bytes to the metadata.
    """
    plain = safetensors.torch.save({name: x.cpu().contiguous() for name, x in tensors.items()})
    start = 8 + int.from_bytes(plain[:8], "little")
    header, data = json.loads(plain[8:start]), plain[start:]
    header["__metadata__"] = {**metadata}
    if checksum:
        header["__metadata__"]["checksum"] = _checksum(header, data)
    # safetensors writes a header in any order.
    text = _sorted_json(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def unpack_tensors(
    content: bytes, *, checksum: bool = False
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file.

    Args:
        content: the file's bytes.
        checksum: require the CRC-32 that `pack_tensors` adds.

    Raises:
        ValueError: the file is damaged, its header is larger than 4 MB, or the checksum is wrong.
    """
    metadata, header, data = _split(content)
    if checksum and metadata.pop("checksum", None) != _checksum(header, data):
        raise ValueError("its checksum is wrong")
    try:
        return metadata, safetensors.torch.load(content)
    # safetensors and torch raise many types for unknown dtypes and impossible shapes.
    except Exception as error:
        raise ValueError(f"it is not a valid safetensors file ({error})") from error


def read_metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        ValueError: the file is not a safetensors file, or its header is larger than 4 MB.
    """
    return _split(content)[0]


def _split(content: bytes) -> tuple[dict[str, str], dict[str, Any], memoryview]:
    """Return the metadata, the header without its checksum, and the data."""
    start = 8 + int.from_bytes(content[:8], "little")
    if start > 8 + _HEADER_LIMIT:
        raise ValueError(f"it does not begin with a header of at most {_HEADER_LIMIT:,} bytes")
    if start > len(content):
        raise ValueError("it ends too soon")
    header = parse_json(content[8:start])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise ValueError("its header is not one of a safetensors file")
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata is not text")
    signed = {name: text for name, text in metadata.items() if name != "checksum"}
    return metadata, {**header, "__metadata__": signed}, memoryview(content)[start:]


def _checksum(header: Mapping[str, Any], data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data, zlib.crc32(_sorted_json(header))):08x}"


def _sorted_json(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
