"""Whether the file of a compiled library is whole, found out before it is loaded: a damaged one crashes the process.

On Linux the build writes a checksum of code, constants and relocations into the file (checksum.cmake). `strip` and
`auditwheel repair` leave those sections and the checksum as they are. A file without a checksum is taken as it is.
"""

import hashlib
import struct
from typing import NamedTuple

CHECKSUM = ".selectra.sha256"
ELF_64_LITTLE = b"\x7fELF\x02\x01"
HEADER_SIZE, ENTRY_SIZE = 64, 64


class _Section(NamedTuple):
    address: int
    begin: int
    size: int


def damage(content: bytes) -> str | None:
    """What is wrong with the content of a library's file, or None; only 64-bit ELF files are looked into."""
    if len(content) < HEADER_SIZE or not content.startswith(ELF_64_LITTLE):
        return None
    (table,) = struct.unpack_from("<Q", content, 0x28)
    entry_size, entries, names_at = struct.unpack_from("<HHH", content, 0x3A)
    if len(content) < table + entry_size * entries:
        return "it ends too early"
    if entries == 0:
        return None
    if entry_size != ENTRY_SIZE or names_at >= entries:
        return "its header is overwritten"
    return _damage_in_sections(content, _sections(content, table, entries, names_at))


def _damage_in_sections(content: bytes, sections: dict[str, _Section]) -> str | None:
    if ".text" not in sections:
        return "its table of sections is overwritten"
    if CHECKSUM not in sections:
        return None
    _, begin, size = sections[CHECKSUM]
    recorded, _, names = content[begin : begin + size].decode("ascii", "replace").partition(" ")
    summed = sorted(sections[name] for name in names.split() if name in sections)
    return None if _digest(content, summed) == recorded else "its checksum does not fit its content"


def _sections(content: bytes, table: int, entries: int, names_at: int) -> dict[str, _Section]:
    """The sections by their names, from the table that lies at `table`."""
    rows = [struct.unpack_from("<IIQQQQ", content, table + ENTRY_SIZE * entry) for entry in range(entries)]
    _, _, _, _, begin, size = rows[names_at]
    names = content[begin : begin + size]
    return {
        names[name:].partition(b"\0")[0].decode("ascii", "replace"): _Section(address, begin, size)
        for name, _, _, address, begin, size in rows
    }


def _digest(content: bytes, sections: list[_Section]) -> str:
    """The SHA-256 of sections as they lie in memory, the gaps between them filled with zeros."""
    image = hashlib.sha256()
    end = sections[0].address if sections else 0
    for address, begin, size in sections:
        # A gap as long as the file, or a section outside it, stands in no table that is whole.
        if not 0 <= address - end <= len(content) or begin + size > len(content):
            return ""
        image.update(bytes(address - end))
        image.update(content[begin : begin + size])
        end = address + size
    return image.hexdigest()
