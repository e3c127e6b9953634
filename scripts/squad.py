"""SQuAD's JSON comes in; its questions go out, or its two parts:

    python3 scripts/squad.py split FILE.json FOLDER

which writes all articles but the last ten to FOLDER/train.json, and those to FOLDER/test.json. And where answers stand in
windows of a text, and how transformers' pipeline finds them.
"""

import json
import sys
from pathlib import Path

HELD_OUT = 10


def read(path):
    """(question, context, right answers with their places) of each question."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    return [(q["question"], p["context"], q["answers"]) for p in paragraphs for q in p["qas"]]


def wanted(encoding, window, answers):
    """The first and the last token of the answer in a window, as run_qa.py finds them; 0 for both without one."""
    of, offsets = encoding.sequence_ids(window), encoding["offset_mapping"][window]
    own = [i for i, sequence in enumerate(of) if sequence == 1]
    if not answers or not own:
        return 0, 0
    begin, end = answers[0]["answer_start"], answers[0]["answer_start"] + len(answers[0]["text"])
    if offsets[own[0]][0] > begin or offsets[own[-1]][1] < end:
        return 0, 0
    return max(i for i in own if offsets[i][0] <= begin), min(i for i in own if offsets[i][1] >= end)


def best_answer(windows, context, n_best=20, max_answer_length=30):
    """The best answer of a question, as the question-answering pipeline finds it with align_to_words=False. `windows` are
    (start scores, end scores, the sequence of each token, offsets)."""
    import numpy as np
    from transformers.pipelines.question_answering import select_starts_ends

    found = {}
    for start, end, of, offsets in windows:
        mask = np.array([[sequence != 1 and i > 0 for i, sequence in enumerate(of)]])
        starts, ends, scores, _ = select_starts_ends(
            start[None], end[None], mask, np.ones_like(mask, dtype=int), 1e6, n_best, False, max_answer_length
        )
        for first, last, score in zip(starts, ends, scores):
            text = context[offsets[first][0] : offsets[last][1]]
            key = text.lower()
            found[key] = (found.get(key, (0, text))[0] + score, found.get(key, (0, text))[1])
    return max(found.values(), default=(0, ""), key=lambda pair: pair[0])[1]


def main():
    if len(sys.argv) != 4 or sys.argv[1] != "split":
        sys.exit(__doc__)
    whole = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    for part, articles in (("train", whole["data"][:-HELD_OUT]), ("test", whole["data"][-HELD_OUT:])):
        path = folder / f"{part}.json"
        path.write_text(json.dumps(whole | {"data": articles}, ensure_ascii=False), encoding="utf-8")
        print(f"{path}: {len(articles)} articles, {len(read(path))} questions", file=sys.stderr)


if __name__ == "__main__":
    main()
