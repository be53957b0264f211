"""Writes src/data/tok_unicode.inc: what the Hugging Face tokenizers package takes each Unicode character for. Asked of
the package itself, character by character, because its parts follow four different versions of Unicode.
  python tests/tokenizer_unicode.py > src/data/tok_unicode.inc
"""
import unicodedata

from tokenizers import Regex, normalizers, pre_tokenizers

CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
SPACED = "".join("a" + c for c in CHARACTERS)  # character i stands at 2 i + 1


def removed_by(normalizer):
    return [c for c in CHARACTERS if normalizer.normalize_str("a" + c + "b") == "ab"]


def matched_by(pattern):
    kept = set(normalizers.Replace(Regex(pattern), "").normalize_str("".join(CHARACTERS)))
    return [c for c in CHARACTERS if c not in kept]


def left_out_by(pre_tokenizer, text):
    """Characters outside every piece, and those a piece begins at."""
    inside, begins = bytearray(len(text)), set()
    for _, (begin, end) in pre_tokenizer.pre_tokenize_str(text):
        inside[begin:end] = b"\1" * (end - begin)
        begins.add(begin)
    return [text[i] for i in range(len(text)) if not inside[i]], [text[i] for i in sorted(begins)]


def bert(**on):
    off = dict(clean_text=False, handle_chinese_chars=False, strip_accents=False, lowercase=False)
    return normalizers.BertNormalizer(**{**off, **on})


def classes():
    """Sets of characters, in the order of the bits of enum CharClass."""
    every = "".join(CHARACTERS)
    spaces, _ = left_out_by(pre_tokenizers.WhitespaceSplit(), every)
    punctuation, _ = left_out_by(pre_tokenizers.Punctuation("removed"), every)
    _, digits = left_out_by(pre_tokenizers.Digits(True), SPACED)
    _, no_words = left_out_by(pre_tokenizers.Whitespace(), SPACED)
    marks = set(removed_by(normalizers.StripAccents()))
    nfkd = normalizers.NFKD()
    unknown = [c for c in CHARACTERS if unicodedata.category(c) == "Cn" or unicodedata.category(c)[0] == "M"
               and c not in marks or unicodedata.decomposition(c) and nfkd.normalize_str(c) == c]
    unknown_set = set(unknown)
    letters = matched_by(r"\p{L}")
    # Those that a composed form leaves as they are, whatever stands around them.
    pairs = [unicodedata.decomposition(c).split() for c in CHARACTERS if unicodedata.decomposition(c)[:1] != "<"]
    followers = {pair[1] for pair in pairs if len(pair) == 2}
    joins = {chr(int(c, 16)) for c in followers} | {chr(c) for c in [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]}
    alone = [c for c in CHARACTERS if c not in joins and (unicodedata.combining(c) == 0 or c in unknown_set)]
    settled = [[c for c in alone if form.normalize_str(c) == c] for form in (normalizers.NFC(), normalizers.NFKC())]
    words = set(CHARACTERS) - set(no_words) - set(spaces) | {"a"}
    return [letters, matched_by(r"\p{N}"), spaces, matched_by(r"\p{M}"), words, [c for c in digits if c != "a"],
            punctuation, removed_by(bert(clean_text=True)), removed_by(bert(strip_accents=True)), marks, unknown, *settled]


def table():
    masks = [0] * 0x110000
    for bit, characters in enumerate(classes()):
        for c in characters:
            masks[ord(c)] |= 1 << bit
    lower = normalizers.Lowercase()
    runs = [f"{{{c:#x}, {masks[c]:#x}}}" for c in range(0x110000) if c == 0 or masks[c] != masks[c - 1]]
    lowered = [(ord(c), ord(lower.normalize_str(c)) - ord(c)) for c in CHARACTERS
               if ord(c) > 127 and len(lower.normalize_str(c)) == 1 and lower.normalize_str(c) != c]
    cases = []  # {first, last, stride, difference}
    for c, difference in lowered:
        last = cases[-1] if cases else None
        if last and last[3] == difference and (c - last[1] == last[2] or last[0] == last[1] and c - last[1] <= 2):
            last[2] = c - last[1]
            last[1] = c
        else:
            cases.append([c, c, 1, difference])
    cases = [f"{{{first:#x}, {last:#x}, {stride}, {difference}}}" for first, last, stride, difference in cases]
    title = ("// Written by tests/tokenizer_unicode.py. First characters of runs of one mask of CharClass; lower case as "
             "runs\n// {first, last, stride, difference}.\n")
    return title + wrap("ClassRun kClassRuns", runs) + wrap("CaseRun kLowerRuns", cases)


def wrap(name, entries):
    lines, line = [f"constexpr {name}[] = {{"], "   "
    for entry in entries:
        if len(line) + len(entry) > 117:
            lines.append(line)
            line = "   "
        line += f" {entry},"
    return "\n".join(lines + [line, "};", ""])


if __name__ == "__main__":
    print(table(), end="")
