"""From the bytes of a text file to its characters: read where the encoding is certain, refused where it is not."""

import codecs
import re
import shlex
import unicodedata
from collections import Counter
from itertools import pairwise
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
    *("iso8859-2", "iso8859-3", "iso8859-9", "iso8859-15", "koi8-r", "macintosh"),
    *("shift-jis", "euc-jp", "gb18030", "big5", "euc-kr"),
]
#: Languages of Windows-1252: frequent words in ASCII that languages of other code pages do not have, and their letters.
_LANGUAGES = {
    "English": ("the and this that with of it was", "éäöü"),
    "German": ("und der die das ist nicht ein eine ich", "äöüßéà"),
    "French": ("les des est une dans pour avec qui mais", "àâçèéêëîïôùûüœ"),
    "Spanish": ("los las que una muy con para del pero", "áéíóúüñ"),
    "Portuguese": ("uma com os dos muito mas que para mais", "áàâãçéêíóôõú"),
    "Italian": ("che di il della sono molto questo con non", "àèéìòù"),
    "Dutch": ("het een niet van dat voor maar zijn", "áèéëïóöü"),
    "Swedish": ("och att som det inte med jag", "åäöé"),
    "Finnish": ("ja on ei se että mutta oli", "äöå"),
    "Danish": ("og ikke det som til jeg med af av", "æøåé"),
}
#: A language is there if so many words are, and one of so many words is one of its frequent ones.
_HITS, _ONE_OF = 2, 16
#: Words with letters that English has only in them; as text of another code page they are other letters.
_LOANS = frozenset("naïve naïveté façade voilà déjà crème brûlée señor jalapeño piñata fête à café über".split())  # noqa: SIM905
_WORD = re.compile("[A-Za-zÀ-ÖØ-öø-ÿŒœŠšŽžŸ]+")
#: Signs where they belong: elsewhere a quote is an accented letter of DOS or Mac, "³" is Polish, "¾" Slovak, ...
_PLACED = re.compile(
    r"(?<!\w)[“„](?=[^“”„]{1,2000}[”“](?!\w))|(?<=[^\s“„])[”“](?!\w)|(?<!\w)‘(?=\w)"
    r"|(?<!\w)[«‹](?=\s?\w)|(?<=[^«‹])[»›](?!\w)|[€£¥](?=\s?\d)|(?<=\d)[€£¥°ªº](?!\w)|(?<=\d\s)[€£¥°](?!\w)|(?<=\d)°(?=[CF]\b)"
    r"|(?<=\s)[€•·–—](?=\s)|(?<=\d)[–×](?=\d)|(?<=\s)[×±](?=\s?\d)|§(?=\s?\d)|(?<=\w)[®™](?!\w)|©(?=\s?\d)"
    r"|(?<![^\W\d])[½¼¾](?!\w)|(?<=[\dm])[²³](?!\w)|(?<=\w)´(?=\w)"
)
#: Those that are accented letters of DOS and Mac just where they belong: "voil…", "d’a", "est\u00a0".
_LOOSE = re.compile(
    r"(?<=[\w.,!?])’(?!\w)|(?<=\w)’(?=\w)|…|—|–(?=[A-Z\d\s])|\u00a0|(?<=[a-z])\u00ad(?=[a-z])|(?<!\w)[¿¡](?=\w)"
)


def check_encoding(name: str) -> None:
    """Refuses a name that is no encoding, or none that holds ASCII as it is, which is told from UTF-8 by nothing.

    Raises:
        UserError: It is one.
    """
    ascii_text = bytes(range(128))
    try:
        same = ascii_text.decode(name) == ascii_text.decode("ascii")
    except (LookupError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"data.encoding: '{name}' is none that ASCII is a part of; give one such as windows-1252, cp1250 or "
            "gb18030 (UTF-8, UTF-16 and UTF-32 are recognized without it)"
        )


def decode(data: bytes, path: Path, stated: str | None = None) -> tuple[str, str]:
    """The text of a file and the encoding that it was read as: "utf-8", or another that is certain.

    Args:
        data: The bytes of the file.
        path: The file, for messages.
        stated: The encoding of a file that is not in UTF-8, UTF-16 or UTF-32.

    Raises:
        UserError: It is not certain; the line, the encodings that are possible and a command are named.
    """
    if stated:
        check_encoding(stated)
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
    if stated:
        return _strict(data, stated, path, "is not UTF-8, and data.encoding says"), stated
    if (text := _western(data)) is not None:
        return text, "windows-1252"
    line = data.count(b"\n", 0, start) + 1
    where = f"{path}, line {line}: byte 0x{data[start]:02x} is not UTF-8 text"
    replaced = data.decode(errors="replace")
    wrong = replaced.count("\ufffd")
    if sum(not character.isascii() for character in replaced) > 2 * wrong:
        raise UserError(f"{where}, as nearly all of the file is ({wrong} places are not); correct them")
    quoted = shlex.quote(str(path))
    command = f"gzip -dc {quoted} | iconv -f ENCODING -t utf-8" if path.suffix == ".gz" else ""
    raise UserError(
        f"{where}, and which encoding it is in is not certain: {_possible(data, start) or 'a rare one'}. Set "
        f"data.encoding to the right one, or save the file as UTF-8: "
        f"{command or f'iconv -f ENCODING -t utf-8 {quoted}'} > NEW"
    )


def _strict(data: bytes, encoding: str, path: Path, why: str = "begins with the mark of") -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise UserError(
            f"{path}, line {line}: {why} {encoding.removesuffix('-sig').upper()}, but byte "
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
    """The text in Windows-1252 (which holds Latin-1), if it is certainly in a language of Western Europe."""
    try:
        text = data.decode("windows-1252")
    except UnicodeDecodeError:
        return None
    counts = Counter(word.lower() for word in _WORD.findall(text))
    spoken = {name for name, (words, _) in _LANGUAGES.items() if _is_spoken(words.split(), counts)}
    letters = {letter for name in spoken for letter in _LANGUAGES[name][1]}
    words = {word for word in _WORD.findall(text) if not word.isascii()}
    if not all(_is_western(word, letters) or (word.lower() in _LOANS and spoken) for word in words):
        return None
    # DOS and Mac have no letters there, or capital ones, so that these words are of Windows.
    loose = "English" in spoken or any("à" <= letter <= "ÿ" for word in words for letter in word)
    rest = _PLACED.sub("", text)
    rest = _WORD.sub("", _LOOSE.sub("", rest) if spoken and loose else rest)
    if not spoken or not rest.isascii() or text.count("”") > text.count("“") + text.count("„"):
        return None
    other = {w.lower() for code in ("cp850", "macintosh") for w in _WORD.findall(data.decode(code, "replace"))}
    return None if (other - counts.keys()) & _LOANS else text


def _is_spoken(words: list[str], counts: Counter[str]) -> bool:
    hits = sum(counts[word] for word in words)
    return hits >= _HITS and hits * _ONE_OF >= counts.total()


def _is_western(word: str, letters: set[str]) -> bool:
    """Whether the letters beyond ASCII are of these, among ASCII ones, and none is a capital after a small one."""
    others = [letter for letter in word if not letter.isascii()]
    return (
        letters.issuperset(letter.lower() for letter in others)
        and (len(word) == 1 or 2 * (len(word) - len(others)) >= len(others))
        and not any(a.islower() and b.isupper() and not b.isascii() for a, b in pairwise(word))
    )


def _possible(data: bytes, start: int) -> str:
    """The readings of the word around a byte, each with the encodings that give it, likely ones first."""
    from charset_normalizer import from_bytes

    part = data[max(0, data.rfind(b"\n", 0, max(0, start - 2000)) + 1) : start + 20_000]
    names = [name for match in from_bytes(part, cp_isolation=_COMMON) for name in match.could_be_from_charset]
    likely = list(dict.fromkeys(codecs.lookup(name).name for name in names))
    known = {codecs.lookup(name).name: name for name in _COMMON}
    word = next(match[0] for match in re.finditer(rb"[^\x00-/:-?\[\]{}]+", data) if match.end() > start)
    found: list[tuple[bool, int, str, str]] = []
    for each, name in known.items():
        try:
            reading = word.decode(each)
        except UnicodeDecodeError:
            continue
        odd = {unicodedata.category(c)[0] for c in reading} - set("LMP")
        scripts = {unicodedata.name(c, "").split(" ")[0] for c in reading if c.isalpha()}
        rank = likely.index(each) if each in likely else len(likely)
        found.append(
            (bool(odd) or ("LATIN" in scripts and len(scripts) > 1 and each not in likely), rank, reading, name)
        )
    readings: dict[str, list[str]] = {}
    for _, _, reading, name in sorted(found, key=lambda each: each[:2]):
        readings.setdefault(reading[:30], []).append(name)
    return "; ".join(f"'{reading}' in {' or '.join(names)}" for reading, names in [*readings.items()][:12])
