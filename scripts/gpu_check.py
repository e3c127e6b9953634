"""What scripts/gpu-check compares: results of tk come in; a figure goes out, and exit code 1 where they are too far apart.

    gpu_check.py provider RESULT NAME             what `tk doctor --json` says of a provider; exit code 77 where it lacks
    gpu_check.py losses A B TOLERANCE             the training losses of two runs (`tk train --json`)
    gpu_check.py steps A B                        steps of benches/step beside those of scripts/reference-step
    gpu_check.py jobs A B                         `tk train --json` beside scripts/reference-training
    gpu_check.py parity RESULT RUNTIME...         `tk parity --json`: what is said of these runtimes
    gpu_check.py answers A B SAME TOLERANCE       labels and scores of two files of `tk serve-batch`: the share of equal labels
                                                  is at least SAME, and no score further away than TOLERANCE
    gpu_check.py texts A B SAME                   texts of two files of `tk serve-batch`: what is the same from their start on, of
                                                  those that were drawn, is SAME of them at least
    gpu_check.py bench RESULT                     `tk bench --json`: the most tokens of a second
    gpu_check.py prompts RECORDS COUNT            prompts of several lengths, beams among them, for `tk serve-batch`
    gpu_check.py url FILE                         where a server listens, by what it says
"""

import json
import os
import re
import sys

SKIPPED = 77


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def provider(result, name):
    found = next(entry for entry in read(result)["providers"] if entry["name"] == name)
    if not found["works"]:
        print(found["reason"])
        sys.exit(SKIPPED)
    print("works")


def losses(a, b, tolerance):
    a, b = (read(path)["train_loss"] for path in (a, b))
    print(f"loss {a:.4f} and {b:.4f}")
    return abs(a - b) <= float(tolerance)


def steps(a, b):
    told = []
    for ours, torch in zip(lines(a), lines(b), strict=True):
        mine, theirs = (step["seconds"] for step in (ours, torch))
        told.append(f"{ours['batch']}x{ours['length']} {1e3 * mine:.1f} ms, PyTorch's / tk's {theirs / mine:.2f}")
    print("; ".join(told))


def jobs(a, b):
    ours, torch = read(a), read(b)
    mine, theirs = (job["train_seconds"] for job in (ours, torch))
    print(f"{mine:.1f} s, PyTorch's / tk's {theirs / mine:.2f}; loss {ours['train_loss']:.4f} and {torch['train_loss']:.4f}")


def parity(result, *names):
    found = read(result)
    runtimes = {runtime["name"]: runtime for runtime in found["runtimes"]}
    missing = [name for name in names if name not in runtimes]
    if missing:
        print(f"{', '.join(missing)}: not compared")
        return False
    worst = max(runtimes[name]["max_abs"] for name in names)
    print(f"max |Δ| {worst:.1e} of {runtimes[names[0]]['tolerance']:.1e}")
    return found["pass"]


def answers(a, b, same, tolerance):
    a, b = lines(a), lines(b)
    labels = [x.get("label") is not None and x.get("label") == y.get("label") for x, y in zip(a, b)]
    apart = [abs(x["scores"][label] - y["scores"][label]) for x, y in zip(a, b) for label in x.get("scores", {})]
    share, worst = sum(labels) / max(len(labels), 1), max(apart, default=float("nan"))
    print(f"{100 * share:.2f} % of {len(labels)} labels equal, scores within {worst:.1e}")
    return len(a) == len(b) and share >= float(same) and worst <= float(tolerance)


def texts(a, b, same):
    a, b = lines(a), lines(b)
    if len(a) != len(b) or not a or any("error" in answer for answer in a + b):
        print(f"{len(a)} and {len(b)} answers, errors among them")
        return False
    pairs = [(x["text"], y["text"]) for x, y in zip(a, b)]
    common = [len(os.path.commonprefix(pair)) / max(map(len, pair), default=1) if any(pair) else 1.0 for pair in pairs]
    drawn = common[::2]
    share, least = sum(common) / len(common), sum(drawn) / len(drawn)
    print(f"{100 * share:.0f} % of {len(pairs)} texts are the same from their start on, of drawn ones {100 * least:.0f} %")
    return least >= float(same)


def bench(result):
    found = read(result)
    rates = [
        cell.get("tokens_per_second") or cell.get("decode_tokens_per_second") for cell in found["cells"]
    ]
    print(f"{max(rates):.0f} tokens/s")
    return max(rates) > 0


def prompts(records, count):
    """The words of a text, so many that caches grow while others are under way. Every eighth is searched with beams, and
    every other one is drawn, which depends on the scores of all tokens."""
    for i, record in enumerate(lines(records)[: int(count)]):
        prompt = {"prompt": " ".join(record["text"].split()[: 3 + i * 13 % 90]), "max_new_tokens": 16 + i * 29 % 150}
        if i % 8 == 7:
            prompt |= {"num_beams": 4, "max_new_tokens": 24}
        elif i % 2 == 0:
            prompt |= {"temperature": 0.8, "seed": i}
        print(json.dumps(prompt))
    return True


def url(file):
    with open(file, encoding="utf-8") as said:
        found = re.search(r"listening on (http://\S+?),", said.read())
    if found:
        print(found[1])
    return bool(found)


COMMANDS = {f.__name__: f for f in (provider, losses, steps, jobs, parity, answers, texts, bench, prompts, url)}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    sys.exit(0 if COMMANDS[sys.argv[1]](*sys.argv[2:]) is not False else 1)
