"""Directories that tk trained come in; exit code 1 goes out where TensorBoard's own reader does not find in their event
files what stands in their logs, or huggingface_hub in their model cards not what was measured. scripts/check-logs calls it."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
TK = os.environ.get("TK", str(ROOT / "target/release/tk"))
CLOCKED = "train/tokens_per_second"


def train(directory):
    """A run that is killed behind its 20th step and resumed."""
    records = [{"text": text, "label": label} for text, label in [("good", "a"), ("bad", "b"), ("so so", "c")]] * 80
    data = directory / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = directory / "run"
    command = [TK, "train", "--task", "text-classification", "--model", ROOT / "models/tiny-bert-single", "--train", data,
               "--eval", data, "--output", output, "--epochs", "10", "--batch-size", "6", "--max-length", "48",
               "--save-every", "7"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not run.stderr.readline().startswith("step 20/"):
        assert run.poll() is None, "the run has ended by itself"
    run.send_signal(signal.SIGKILL)
    run.communicate()
    subprocess.run([TK, "train", "--resume", "--quiet", "--output", output], check=True)
    files = list((output / "training").glob("*tfevents*"))
    assert len(files) == 2, files
    return output


def as_f32(number):
    return math.nan if number is None else struct.unpack("f", struct.pack("f", number))[0]


def check_events(directory):
    """Every number of the log stands once, at its step, in what TensorBoard shows."""
    wanted = {}
    for line in (directory / "training/log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name not in ("step", "epoch", "tokens"):
                tag = name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"
                wanted.setdefault(tag, []).append((entry["step"], as_f32(value)))
    events = EventAccumulator(str(directory / "training"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    assert sorted(tags) == sorted(wanted), f"{tags} where {sorted(wanted)} were logged"
    count = 0
    for tag in tags:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        same = [a[0] == b[0] and (a[1] == b[1] or math.isnan(b[1]) and not math.isfinite(a[1])) for a, b in zip(found, wanted[tag])]
        assert len(found) == len(wanted[tag]) and all(same), f"{tag}: {found[:5]} … where {wanted[tag][:5]} … were logged"
        times = [event.wall_time for event in events.Scalars(tag)]
        assert times == sorted(times), f"{tag}: times that go back"
        count += len(found)
    return f"TensorBoard reads {len(tags)} curves, {count} numbers, as logged"


def check_card(directory):
    """The results in the card's front matter, as the hub's own reader reads them, stand in its table; the card is anew what
    it is."""
    card = ModelCard.load(directory / "README.md")
    table = dict(re.findall(r"^\| (\w+) \| (-?[\d.]+) \|$", card.text, re.MULTILINE))
    results = card.data.eval_results
    assert results, "no results"
    for result in results:
        assert result.task_type == (card.data.pipeline_tag or result.task_type), result
        assert result.dataset_name and result.dataset_type and result.metric_type, result
        assert float(table[result.metric_name]) == round(result.metric_value, 4), (result, table)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    return f"huggingface_hub reads {len(results)} results of {card.data.model_name}"


def main():
    with tempfile.TemporaryDirectory() as work:
        directories = [Path(name) for name in sys.argv[1:]]
        if not directories:
            directories = [train(Path(work))]
            subprocess.run([TK, "report", "--quiet", "--card", directories[0]], check=True, stdout=subprocess.DEVNULL)
        for directory in directories:
            print(f"{directory}: {check_events(directory)}")
            if (directory / "README.md").exists():
                print(f"{directory}: {check_card(directory)}")


main()
