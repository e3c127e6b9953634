"""Called by check-lora: folders that `tk train --lora-rank` wrote, and what tk gave for texts, come in; whether PEFT loads
the folders and gives the same logits goes out, and whether `save_pretrained` of what it loaded is the same adapter."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

TOLERANCE = 1e-5


def main(folder, answers):
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    labels = len(json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"])
    base = AutoModelForSequenceClassification.from_pretrained(settings["base_model_name_or_path"], num_labels=labels)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    worst, largest, count = 0.0, 0.0, 0
    for line in answers.read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        with torch.no_grad():
            inputs = tokenizer(answer["text"], return_tensors="pt", truncation=True, max_length=tokenizer.model_max_length)
            logits = model(**inputs).logits[0]
        found = torch.tensor(answer["logits"])
        worst = max(worst, (logits - found).abs().max().item())
        largest = max(largest, logits.abs().max().item())
        count += 1
    print(f"{folder.name}: {count} texts, logits up to {largest:.2f}, PEFT and tk differ by at most {worst:.1e}")
    if not worst <= TOLERANCE * max(1.0, largest):
        sys.exit(f"{folder.name}: more than {TOLERANCE:g}")
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        ours, theirs = (load_file(Path(at) / "adapter_model.safetensors") for at in (folder, again))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            sys.exit(f"{folder.name}: PEFT saves other tensors than it was given: {sorted(ours.keys() ^ theirs.keys())}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
