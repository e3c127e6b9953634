"""A CoNLL file comes in, perhaps gzipped; its sentences, words and tags go out, or its two parts:

    python3 scripts/conll.py split FILE.conll[.gz] FOLDER

which writes four fifths of the sentences to FOLDER/train.conll and the others to FOLDER/test.conll, shuffled by the
seed 42. Sentences that occur more than once are kept once. And how well predicted tags find the gold ones' entities.
"""

import gzip
import itertools
import random
import sys
from pathlib import Path

BLANK = " \t\r\n"


def blocks(text):
    """The sentences as they are written, a word a line; without the lines that begin a document."""
    lines = (line.rstrip(BLANK) for line in text.removeprefix("\ufeff").split("\n"))
    lines = ("" if line.split("\t")[0].split(" ")[0] == "-DOCSTART-" else line for line in lines)
    return ["\n".join(block) for words, block in itertools.groupby(lines, bool) if words]


def blocks_of(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        return blocks(file.read())


def read(path):
    """The words of each sentence, and their tags, of the last column."""
    words, tags = [], []
    for sentence in blocks_of(path):
        tabs = "\t" in sentence  # no other blank: words hold those
        rows = [line.split("\t") if tabs else list(filter(None, line.split(" "))) for line in sentence.split("\n")]
        words.append([row[0] for row in rows])
        tags.append([row[-1] for row in rows])
    return words, tags


def split(sentences):
    """What to train on and what to test with, of sentences as they are written."""
    kept = list(dict.fromkeys(sentences))
    random.Random(42).shuffle(kept)
    cut = len(kept) * 4 // 5
    return {"train": kept[:cut], "test": kept[cut:]}


def as_text(sentences):
    return "".join(sentence + "\n\n" for sentence in sentences)


def entities(tags):
    """(type, first word, last word) of each, as seqeval's get_entities finds them, which is conlleval's way: what does
    not keep to a scheme begins and ends an entity where its type changes."""
    found, begin, last, last_type = set(), 0, "O", ""
    for at, tag in enumerate([*tags, "O"]):
        here, type_ = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        changes = type_ != last_type
        if last in "ES" or (last in "BI" and here in "BSO") or (last not in "O." and changes):
            found.add((last_type, begin, at - 1))
        if here in "BS" or (last in "ESO" and here in "EI") or (here not in "O." and changes):
            begin = at
        last, last_type = here, type_
    return found


def f1(gold, predicted):
    """Of the entities of all sentences together: seqeval's f1_score."""
    right = found = wanted = 0
    for a, b in zip(gold, predicted, strict=True):
        a, b = entities(a), entities(b)
        right, wanted, found = right + len(a & b), wanted + len(a), found + len(b)
    return 2 * right / (wanted + found) if wanted + found else 0.0


def main():
    if len(sys.argv) != 4 or sys.argv[1] != "split":
        sys.exit(__doc__)
    source, folder = Path(sys.argv[2]), Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in split(blocks_of(source)).items():
        (folder / f"{name}.conll").write_text(as_text(part), encoding="utf-8")
        tags = read(folder / f"{name}.conll")[1]
        words, found = sum(map(len, tags)), sum(len(entities(t)) for t in tags)
        print(f"{folder}/{name}.conll: {len(part)} sentences, {words} words, {found} entities", file=sys.stderr)


if __name__ == "__main__":
    main()
