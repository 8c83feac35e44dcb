"""From the bytes of a text file to its characters: read where the encoding is certain, refused where it is not."""

import codecs
import re
import unicodedata
from pathlib import Path

from lightning_lora.errors import UserError

#: UTF-32 first, as its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_BINARY = {
    b"PK\x03\x04": "an Excel workbook or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
#: What a file may be in that is refused, by names that iconv and Python both know.
_COMMON = [
    *(f"cp{number}" for number in (1250, 1251, 1252, 1253, 1254, 1255, 1256, 1257, 874, 437, 850, 852, 866)),
    *("iso8859-2", "iso8859-9", "iso8859-15", "koi8-r", "macintosh"),
    *("shift-jis", "euc-jp", "gb18030", "big5", "euc-kr"),
]
_LETTERS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜŒŸßàáâãäåæçèéêëìíîïñòóôõöøùúûüœÿ"
_IN_WORDS = "‘’…–—·\u00a0\u00ad"
_SIGNS = "“”„«»‹›•€£§©®™°´¡¿ªº½¼¾²³±×‰†¥"
#: What Western European text does not hold, or not there: each is what text in another encoding looks like when it is
#: read as Windows-1252 (Polish "³" in a word, Czech "š", Turkish "þ", Cyrillic as rows of accents, Mac "isnÕt", ...).
_NOT_WESTERN = re.compile(
    rf"[^\x00-\x7f{_LETTERS}{_IN_WORDS}{_SIGNS}]|[^\W\d_][{_SIGNS}][^\W\d_]|[{_LETTERS}]{{3}}|[a-zß-ÿ][À-ÞŒŸ]"
)


def decode(data: bytes, path: Path) -> tuple[str, str]:
    """The text of a file and the encoding that it was read as: "utf-8", or another that is certain.

    Raises:
        UserError: It is not certain; the line, the encodings that are possible and a command are named.
    """
    for magic, kind in _BINARY.items():
        if data.startswith(magic):
            raise UserError(f"{path}: is {kind}, whatever its ending says; save it as UTF-8 text, or rename it")
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return _strict(data, encoding, path), "utf-8" if mark == codecs.BOM_UTF8 else encoding
    if b"\0" in data:
        for encoding in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
            if (text := _wide(data, encoding)) is not None:
                return text, encoding
    try:
        return data.decode(), "utf-8"
    except UnicodeDecodeError as error:
        start = error.start
    if (text := _western(data)) is not None:
        return text, "windows-1252"
    line = data.count(b"\n", 0, start) + 1
    where = f"{path}, line {line}: byte 0x{data[start]:02x} is not UTF-8 text"
    replaced = data.decode(errors="replace")
    wrong = replaced.count("\ufffd")
    if sum(not character.isascii() for character in replaced) > 2 * wrong:
        raise UserError(f"{where}, as nearly all of the file is ({wrong} places are not); correct them")
    found = _possible(data, start)
    raise UserError(
        f"{where}, and which encoding it is in is not certain; save the file as UTF-8, for example: "
        f"iconv -f ENCODING -t utf-8 '{path}' > NEW, where ENCODING may be {' or '.join(found) or 'a rare one'}"
    )


def _strict(data: bytes, encoding: str, path: Path) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise UserError(
            f"{path}, line {line}: begins with the mark of {encoding.removesuffix('-sig').upper()}, but byte "
            f"0x{data[error.start]:02x} does not belong to it; correct the file, or save it as UTF-8"
        ) from None


def _wide(data: bytes, encoding: str) -> str | None:
    """The text, if all of it consists of characters that exist, with lines as text has them."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    odd = {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cn", "Co")} - set("\t\r\n\f\v")
    return text if not odd and "\n" in text else None


def _western(data: bytes) -> str | None:
    """The text in Windows-1252 (which holds Latin-1), if it looks like a language of Western Europe."""
    try:
        text = data.decode("windows-1252")
    except UnicodeDecodeError:
        return None
    hungarian = "õ" in text and "ã" not in text  # "ő" of Windows-1250; Portuguese has both
    return None if hungarian or _NOT_WESTERN.search(text) else text


def _possible(data: bytes, start: int) -> list[str]:
    """The names of encodings that the text around a byte may be in, likely ones first."""
    from charset_normalizer import from_bytes

    part = data[max(0, data.rfind(b"\n", 0, max(0, start - 2000)) + 1) : start + 20_000]
    names = [name for match in from_bytes(part, cp_isolation=_COMMON) for name in match.could_be_from_charset]
    known = {codecs.lookup(name).name: name for name in _COMMON}
    return [known[each] for each in dict.fromkeys(codecs.lookup(name).name for name in names) if each in known][:8]
