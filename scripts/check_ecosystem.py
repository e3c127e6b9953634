"""A directory that tk trained and exported comes in; the verdict of the ecosystem's own tools goes out.

Run by scripts/check-ecosystem, which makes the Python environment.
"""

import argparse
import functools
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)
from transformers.pipelines.token_classification import AggregationStrategy

ROOT = Path(__file__).resolve().parent.parent
BATCH = 16

AWKWARD = [
    "",
    " ",
    "a",
    "?",
    "[SEP]",
    "[CLS] [SEP] [MASK] [UNK] [PAD]",
    "a plain sentence, of no special kind.",
    "exactly " * 126,
    "far over the longest that any model takes " * 200,
    "x" * 5000,
    "Ça va très bien à l'Ångström café — naïve façade, “señor” ß ø Æ İstanbul",
    "cafe\u0301 vs caf\u00e9, \ufb01ne \u2460 \u212b \uff21\uff22\uff23",
    "中文字很好，日本語もカタカナも 한국어도",
    "мне не нравится это кино; שלום עולם; مرحبا بالعالم; नमस्ते दुनिया; สวัสดี",
    "😀😂 ❤️ 👍🏽 👩‍👩‍👧 🇩🇪 #win @you http://t.co/x1Y2 :-) &amp; 100%",
    "tabs\tand\nnew lines\r\nand\u00a0spaces\u2003of\u3000all\u200bkinds \u0007 \ufffd \u0000 end",
    "\u202eright to left\u202c \u2066isolated\u2069 \ufeff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒾𝓈 𝕨𝕚𝕕𝕖 𐍈 𠜎",
]

# What awkward texts are made of, and what stands between.
WORDS = [
    "Paris", "the", "Angela", "Merkel's", "U.S.", "New", "York", "naïve", "e\u0301tude", "Zoe\u0308", "İstanbul", "Straße",
    "ΟΔΥΣΣΕΥΣ", "ﬁne", "ǅ", "東京都", "は", "北京大学", "ประเทศไทย", "서울", "москва", "नमस्ते", "שלום", "ירושלים", "القاهرة",
    "مَرْحَبًا", "\u202eabc\u202c", "😀", "❤️", "👍🏽", "👩‍👩‍👧", "🇩🇪", "don't", "e-mail", "3.14", "#tag", "@you", "#東京", "…", "¿",
    "http://t.co/x1Y2", "https://example.org/a/b?c=d&e=%20#f", "www.Berlin.de", "me@example.org", "&amp;", "[UNK]",
    "[MASK]", "[SEP]", "<mask>", "</s>", "▁", "##ing", "Ġ", "ab\u0300\u0301\u0302c", "a" + "\u0301" * 9, "\ufffd", "\u200b", "\u00ad",
    "x" * 30, "Donaudampfschifffahrtsgesellschaft", "𝔘𝔫𝔦", "𠜎", "Иvan", "Аpple", "LONDON", "london", "iPhone7", "!!!",
]  # fmt: skip
GAPS = [[" "], [""], [" ", "", "  ", "\n", "\t", ", ", "-", "\u3000", "\u00a0"]]
AGGREGATIONS = ["none", "simple", "first", "average", "max"]


class Table:
    def __init__(self):
        self.rows = []

    def add(self, what, found, good):
        self.rows.append((what, found, bool(good)))

    def attempt(self, what, f):
        """Runs one check; an exception is its failure, and the others go on."""
        try:
            f()
        except Exception as error:  # noqa: BLE001
            self.add(what, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", False)

    def print(self):
        width = max(len(what) for what, _, _ in self.rows)
        for what, found, good in self.rows:
            print(f"{'ok  ' if good else 'FAIL'}  {what:{width}}  {found}")
        failed = sum(not good for _, _, good in self.rows)
        print(f"{len(self.rows)} checks, {failed} failed")
        return failed


def shape_of(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def tokens_by(*names):
    return {n: (onnx.TensorProto.INT64, ["batch_size", "sequence_length"]) for n in names}


def is_tagger(config):
    return config.architectures[0].endswith("ForTokenClassification")


def is_answerer(config):
    return config.architectures[0].endswith("ForQuestionAnswering")


# What fills masks or tells whether a text follows: the class, and each output's name, here and in transformers, and what
# of it is one number or more a token.
FILLERS = {
    "ForMaskedLM": (AutoModelForMaskedLM, [("logits", "logits", "vocabulary")]),
    "ForNextSentencePrediction": (AutoModelForNextSentencePrediction, [("seq_relationship_logits", "logits", "pair")]),
    "ForPreTraining": (
        AutoModelForPreTraining,
        [
            ("prediction_logits", "prediction_logits", "vocabulary"),
            ("seq_relationship_logits", "seq_relationship_logits", "pair"),
        ],
    ),
}


def is_filler(config):
    return next((kind for end, kind in FILLERS.items() if config.architectures[0].endswith(end)), None)


def contract(config):
    """The inputs and outputs that a graph must have, in their order: name -> (type, shape)."""
    if not config.architectures[0].endswith("LMHeadModel"):
        types = ["token_type_ids"] if config.model_type == "bert" else []
        inputs = tokens_by("input_ids", "attention_mask", *types)
        if is_answerer(config):
            ends = (onnx.TensorProto.FLOAT, ["batch_size", "sequence_length"])
            return inputs, {"start_logits": ends, "end_logits": ends}
        if is_filler(config):
            shapes = {"vocabulary": ["batch_size", "sequence_length", config.vocab_size], "pair": ["batch_size", 2]}
            return inputs, {name: (onnx.TensorProto.FLOAT, shapes[of]) for name, _, of in is_filler(config)[1]}
        dims = ["batch_size", "sequence_length"] if is_tagger(config) else ["batch_size"]
        return inputs, {"logits": (onnx.TensorProto.FLOAT, [*dims, config.num_labels])}
    past, total = "past_sequence_length", "past_sequence_length + sequence_length"

    def caches(name, length):
        shape = ["batch_size", config.n_head, length, config.n_embd // config.n_head]
        return {
            f"{name}.{layer}.{part}": (onnx.TensorProto.FLOAT, shape)
            for layer in range(config.n_layer)
            for part in ("key", "value")
        }

    inputs = tokens_by("input_ids", "attention_mask", "position_ids")
    inputs["attention_mask"] = (onnx.TensorProto.INT64, ["batch_size", total])
    logits = {"logits": (onnx.TensorProto.FLOAT, ["batch_size", "sequence_length", config.vocab_size])}
    return inputs | caches("past_key_values", past), logits | caches("present", total)


def check_graph(table, directory, graph_file, config):
    inputs, outputs = contract(config)

    def checker():
        onnx.checker.check_model(str(graph_file), full_check=True)
        table.add("onnx: full checker", "passed", True)

    def shapes():
        model = onnx.load(graph_file)
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        known = {v.name: v for v in [*inferred.graph.value_info, *inferred.graph.output]}
        unknown = [n for node in inferred.graph.node for n in node.output if n and n not in known]
        table.add("onnx: strict shape inference", f"{len(known)} values, {len(unknown)} unknown", not unknown)

    def names():
        graph = onnx.load(graph_file, load_external_data=False).graph
        initial = {i.name for i in graph.initializer}
        found = {v.name: (v.type.tensor_type.elem_type, shape_of(v)) for v in graph.input if v.name not in initial}
        shown = [f"{n} {s}" for n, (_, s) in found.items()]
        table.add("onnx: inputs", "; ".join(shown[:4]), list(found.items()) == list(inputs.items()))
        found = {v.name: (v.type.tensor_type.elem_type, shape_of(v)) for v in graph.output}
        shown = [f"{n} {s}" for n, (_, s) in found.items()]
        table.add("onnx: outputs", "; ".join(shown[:2]), list(found.items()) == list(outputs.items()))

    def initializers():
        model = onnx.load(graph_file)
        weights, constants, strangers, unlike = 0, [], [], []
        with safe_open(directory / "model.safetensors", framework="np") as trained:
            names = set(trained.keys())
            for initializer in model.graph.initializer:
                array = onnx.numpy_helper.to_array(initializer)
                name = initializer.name.removesuffix(".T")  # a matrix in the order that MatMul wants
                if name in names:
                    weights += 1
                    same = trained.get_tensor(name)
                    if name != initializer.name:
                        same = np.ascontiguousarray(same.T)
                    if same.shape != array.shape or same.tobytes() != array.tobytes():
                        unlike.append(initializer.name)
                elif array.size == 1 or array.dtype.kind in "iub":
                    constants.append(initializer.name)  # shapes, axes, epsilon: the graph's own
                else:
                    strangers.append(initializer.name)
        table.add("onnx: initializers' names are the checkpoint's",
                  f"{weights} weights of {len(names)}, {len(constants)} constants"
                  + (f", not in the checkpoint: {', '.join(strangers[:5])}" if strangers else ""),
                  weights and not strangers)  # fmt: skip
        table.add("onnx: initializers' bytes are the checkpoint's", ", ".join(unlike[:5]) or "all", not unlike)

    table.attempt("onnx: full checker", checker)
    table.attempt("onnx: strict shape inference", shapes)
    table.attempt("onnx: inputs and outputs", names)
    table.attempt("onnx: initializers", initializers)


def quantizer(table, graph_file):
    """What onnxruntime's own quantizer leaves of the products with a weight, which is silent about those it passes over."""
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / "model.onnx"
        quantize_dynamic(graph_file, quantized)
        graph = onnx.load(quantized).graph
    weights = {tensor.name for tensor in graph.initializer}
    # of a table that is a head's matrix too the transpose is multiplied with
    weights |= {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights}
    left = [node.name for node in graph.node if node.op_type == "MatMul" and weights & set(node.input)]
    done = sum(node.op_type == "MatMulInteger" for node in graph.node)
    table.add("quantize_dynamic", f"{done} products in integers, {len(left)} with a weight left {left[:3]}", done > 0 and not left)


def longest(directory, tokenizer, config):
    """The number of tokens tk cuts at: what the run was trained with, else what the model takes."""
    for file in sorted((directory / "training").glob("settings.*")):
        found = re.search(r'max[-_]length"?\s*[:=]\s*(\d+)', file.read_text())
        if found:
            return int(found[1])
    return min(tokenizer.model_max_length, config.max_position_embeddings)  # transformers' name for every family


def batches(tokenizer, records, max_length, kind):
    for at in range(0, len(records), BATCH):
        part = records[at : at + BATCH]
        texts = [r["text"] for r in part]
        pairs = [r.get("text_pair") or "" for r in part] if any(r.get("text_pair") is not None for r in part) else None
        if pairs and not all("text_pair" in r for r in part):
            yield from (b for r in part for b in batches(tokenizer, [r], max_length, kind))
            continue
        yield tokenizer(texts, pairs, padding=True, truncation=True, max_length=max_length, return_tensors=kind)


def by_record(logits, mask):
    """A batch's logits as an array a record; of tokens, without those of padding."""
    return [one if one.ndim == 1 else one[seen == 1] for one, seen in zip(logits, mask, strict=True)]


def logits_of(tokenizer, records, max_length, model):
    found = []
    with torch.no_grad():
        for b in batches(tokenizer, records, max_length, "pt"):
            found += by_record(model(**b).logits.numpy(), b["attention_mask"].numpy())
    return found


def loaded(table, kind, directory):
    model, loading = kind.from_pretrained(directory, output_loading_info=True)
    wrong = {kind: keys for kind, keys in loading.items() if keys}
    table.add("transformers: loads every weight and no other", str(wrong) if wrong else "all", not wrong)
    return model.eval()


def language_model(table, tk, directory, graph_file, tokenizer, records, new_tokens=32):
    """Scores and texts of ONNX Runtime, of Optimum and of tk against those of transformers."""
    model = loaded(table, AutoModelForCausalLM, directory)
    check_graph(table, directory, graph_file, model.config)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or "<|endoftext|>"
    most = longest(directory, tokenizer, model.config) - new_tokens
    texts = [r["text"] for r in records if tokenizer(r["text"])["input_ids"]]
    groups = [
        tokenizer(texts[at : at + BATCH], padding=True, truncation=True, max_length=most, return_tensors="pt")
        for at in range(0, len(texts), BATCH)
    ]
    prompts = [ids[mask == 1].tolist() for g in groups for ids, mask in zip(g["input_ids"], g["attention_mask"])]
    how = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)

    @functools.cache
    def truth(i, **settings):
        """What transformers generates behind a prompt alone."""
        with torch.no_grad():
            return model.generate(torch.tensor([prompts[i]]), **how, **settings)[0, len(prompts[i]) :].tolist()

    def generated(of):
        with torch.no_grad():
            return [of.generate(**group, **how)[:, group["input_ids"].shape[1] :] for group in groups]

    def onnx_runtime():
        session = onnxruntime.InferenceSession(graph_file, providers=["CPUExecutionProvider"])
        inputs = session.get_inputs()
        worst = 0.0
        for group in groups:
            mask = group["attention_mask"]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            feeds = dict(input_ids=group["input_ids"], attention_mask=mask, position_ids=positions)
            with torch.no_grad():
                truth = model(**feeds).logits.numpy()
            feeds = {name: tensor.numpy() for name, tensor in feeds.items()}
            for i in inputs:
                if i.name.startswith("past_key_values."):
                    feeds[i.name] = np.zeros((len(mask), i.shape[1], 0, i.shape[3]), np.float32)
            found = session.run(["logits"], feeds)[0]
            worst = max(worst, np.abs(found - truth)[mask.numpy() == 1].max())
        table.add("ONNX Runtime against transformers", f"{len(texts)} texts, largest difference {worst:.1e}",
                  worst <= 1e-4)  # fmt: skip

    def optimum():
        from optimum.onnxruntime import ORTModelForCausalLM

        served = ORTModelForCausalLM.from_pretrained(
            str(directory), subfolder="onnx", file_name="model.onnx", local_files_only=True, use_io_binding=False
        )
        same = sum((a == b).all(-1).sum().item() for a, b in zip(generated(served), generated(model), strict=True))
        table.add("Optimum's greedy texts are transformers'", f"{same} of {len(texts)}, {new_tokens} new tokens each",
                  same == len(texts))  # fmt: skip

    def in_place():
        """Of generate.onnx, each text alone: half of it read at once, and then a token a run."""
        session = onnxruntime.InferenceSession(graph_file.with_name("generate.onnx"), providers=["CPUExecutionProvider"])
        pasts = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        worst, count = 0.0, 0
        for prompt in prompts:
            ids, length = torch.tensor([prompt]), len(prompt)
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0].numpy()
            cache = {i.name: np.zeros((1, i.shape[1], length, i.shape[3]), np.float32) for i in pasts}
            ends = [max(1, length // 2)]
            ends += range(ends[0] + 1, length + 1)
            for start, end in zip([0, *ends], ends):
                feeds = dict(
                    input_ids=ids[:, start:end].numpy(), position_ids=np.arange(start, end)[None],
                    seqlens_k=np.array([end - 1], np.int32), total_sequence_length=np.array([end], np.int32),
                    logits_at=np.arange(end - start),
                )  # fmt: skip
                found, *presents = session.run(None, feeds | cache)
                cache = dict(zip(cache, presents))
                worst = max(worst, np.abs(found[0] - scores[start:end]).max())
                count += end - start
        table.add("generate.onnx against transformers", f"{count} tokens, largest difference {worst:.1e}",
                  worst <= 1e-4)  # fmt: skip

    def generates(what, **settings):
        """The texts that `tk serve-batch` writes. A prompt that was cut within a word or a character may be read in other
        tokens: it is left out."""
        texts = [tokenizer.decode(ids) for ids in prompts]
        asked = [dict(prompt=text, max_new_tokens=new_tokens, **settings) for text in texts]
        lines = serve(tk, directory, asked, [])
        kept = [i for i, text in enumerate(texts) if tokenizer(text)["input_ids"] == prompts[i]]
        wanted = [tokenizer.decode(truth(i, **settings), skip_special_tokens=True) for i in kept]
        same = sum(lines[i]["text"] == text for i, text in zip(kept, wanted))
        table.add(f"tk serve-batch's {what} are transformers'", f"{same} of {len(kept)}, {new_tokens} new tokens each",
                  same == len(kept) > 0)  # fmt: skip

    def transformers_js():
        """Each prompt alone, by transformers.js, of model.onnx."""
        found = asked_of_node(directory, dict(prompts=prompts, max_new_tokens=new_tokens))
        same = sum(ids == truth(i) for i, ids in enumerate(found))
        table.add("transformers.js' greedy texts are transformers'", f"{same} of {len(prompts)}, {new_tokens} new tokens each",
                  same == len(prompts))  # fmt: skip

    table.attempt("ONNX Runtime against transformers", onnx_runtime)
    table.attempt("generate.onnx against transformers", in_place)
    attempt_node(table, transformers_js)
    table.attempt("Optimum against transformers", optimum)
    table.attempt("tk serve-batch, greedily", lambda: generates("greedy texts"))
    table.attempt("tk serve-batch, by beams", lambda: generates("best of 4 beams", num_beams=4))


def node_packages():
    """Puts transformers.js under .deps/node, unless it is there."""
    folder, package = ROOT / ".deps/node", "@huggingface/transformers@4.3.1"
    stamp = folder / "installed"  # is written last
    if stamp.exists() and stamp.read_text() == package:
        return
    print(f".deps/node: installing {package}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # the GPU libraries of its ONNX Runtime would be fetched from elsewhere
    skip = dict(ONNXRUNTIME_NODE_INSTALL_CUDA="skip", ONNXRUNTIME_NODE_INSTALL="skip")
    command = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(folder), package]
    subprocess.run(command, env=os.environ | skip, stdout=sys.stderr, check=True)
    stamp.write_text(package)


def asked_of_node(directory, question):
    """What scripts/check_transformers.cjs answers."""
    node_packages()
    command = ["node", ROOT / "scripts/check_transformers.cjs", directory]
    done = subprocess.run([str(part) for part in command], input=json.dumps(question), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"node: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def attempt_node(table, f):
    if shutil.which("npm"):
        table.attempt("transformers.js against transformers", f)
    else:
        print("transformers.js is not checked: npm is not on this machine", file=sys.stderr)


def serve(tk, directory, records, flags):
    """The lines that `tk serve-batch` answers records with, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        question.write_text("".join(json.dumps(r) + "\n" for r in records))
        command = [tk, "serve-batch", directory, "--input", question, "--output", answer, "-q", *flags]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"tk serve-batch: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        lines = [json.loads(line) for line in answer.read_text().splitlines()]
    if [line.get("index") for line in lines] != list(range(len(records))):
        raise RuntimeError(f"{len(lines)} lines for {len(records)} records, or not in order")
    return lines


def served(tk, directory, records):
    """The logits of `tk serve-batch --logits`, in the order of the records."""
    wanted = [{k: r[k] for k in ("text", "text_pair") if k in r} for r in records]
    lines = serve(tk, directory, wanted, ["--logits"])
    broken = [line for line in lines if "logits" not in line]
    if broken:
        raise RuntimeError(f"{len(broken)} lines without logits, the first: {broken[0]}")
    return [np.array(line["logits"], dtype=np.float32) for line in lines]


def compare(table, what, found, truth, tolerance):
    unlike = [i for i, (a, b) in enumerate(zip(found, truth, strict=True)) if a.shape != b.shape]
    if unlike:
        i = unlike[0]
        table.add(what, f"record {i}: shape {found[i].shape}, not {truth[i].shape}", False)
        return
    worst = [np.abs(a - b).max() for a, b in zip(found, truth)]
    at = int(np.argmax(worst))  # the first NaN, if there is one
    table.add(what, f"{len(found)} records, largest difference {worst[at]:.1e} (record {at})", worst[at] <= tolerance)


def awkward(rng, words, gaps):
    """A text of so many words, with what begins and ends some texts."""
    parts = [part for _ in range(words) for part in (rng.choice(WORDS), rng.choice(gaps))]
    return rng.choice(["", "", " ", "\n"]) + "".join(parts)


def windows(continues, room, shared):
    """A long text's windows, as src/data/windows.rs cuts them, of at most `room` tokens: each a pair of ranges, of the
    tokens that the model sees, and of those that it predicts because no other window has more around them."""
    groups = []
    for at, goes_on in enumerate(continues):
        if goes_on and groups:
            groups[-1].append(at)
        else:
            groups.append([at])
    units = [u for group in groups for u in ([group] if len(group) <= room else [[at] for at in group])]
    borders = [unit[0] for unit in units] + [len(continues)]
    seen, first, end = [], 0, 0
    while True:
        while end + 1 < len(borders) and borders[end + 1] - borders[first] <= room:
            end += 1
        seen.append((borders[first], borders[end]))
        if end + 1 == len(borders):
            break
        before, first = first, end
        while (
            first - 1 > before
            and borders[end] - borders[first - 1] <= shared
            and borders[end + 1] - borders[first - 1] <= room
        ):
            first -= 1
    predicts = [[] for _ in seen]
    for unit in units:
        inside = [i for i, (start, stop) in enumerate(seen) if start <= unit[0] and unit[-1] < stop]
        best = max(inside, key=lambda i: min(unit[0] - seen[i][0], seen[i][1] - unit[-1] - 1))  # the first of equals
        predicts[best] += unit
    return [(range(*one), tokens) for one, tokens in zip(seen, predicts)]


def classifier(table, options, config, graph_file, tokenizer, records):
    """Logits of ONNX Runtime, of Optimum, of transformers.js and of tk against those of transformers, of texts or of their
    tokens; of tokens also the entities."""
    directory, tolerance, tagger = options.directory, options.tolerance, is_tagger(config)
    kind = AutoModelForTokenClassification if tagger else AutoModelForSequenceClassification
    model = loaded(table, kind, directory)
    max_length = options.max_length or longest(directory, tokenizer, config)
    print(f"onnx {onnx.__version__}, ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}; {len(records)} texts, at most {max_length} tokens each")  # fmt: skip

    check_graph(table, directory, graph_file, config)
    truth = logits_of(tokenizer, records, max_length, model)

    def onnx_runtime():
        session = onnxruntime.InferenceSession(graph_file, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        found = []
        for b in batches(tokenizer, records, max_length, "np"):
            [logits] = session.run(["logits"], {n: v for n, v in b.items() if n in wanted})
            found += by_record(logits, b["attention_mask"])
        compare(table, "ONNX Runtime against transformers", found, truth, tolerance)

    def optimum():
        from optimum.onnxruntime import ORTModelForSequenceClassification, ORTModelForTokenClassification

        kind = ORTModelForTokenClassification if tagger else ORTModelForSequenceClassification
        loaded = kind.from_pretrained(
            str(directory), subfolder="onnx", file_name="model.onnx", local_files_only=True
        )
        found = logits_of(tokenizer, records, max_length, loaded)
        compare(table, "Optimum against transformers", found, truth, tolerance)

    def transformers_js():
        """Each text alone."""
        inputs = [{n: v[0].tolist() for n, v in b.items()} for r in records
                  for b in batches(tokenizer, [r], max_length, "np")]  # fmt: skip
        asked = dict(head=kind.__name__, inputs=inputs)
        found = [np.array(one, dtype=np.float32) for one in asked_of_node(directory, asked)]
        compare(table, "transformers.js against transformers", found, truth, tolerance)

    def serve_batch():
        found = served(options.tk, directory, records)
        compare(table, "tk serve-batch against transformers", found, truth, tolerance)

    table.attempt("quantize_dynamic", lambda: quantizer(table, graph_file))
    table.attempt("ONNX Runtime against transformers", onnx_runtime)
    table.attempt("Optimum against transformers", optimum)
    attempt_node(table, transformers_js)
    if tagger:
        entities(table, options.tk, directory, tokenizer, model, max_length, tolerance)
    else:
        table.attempt("tk serve-batch against transformers", serve_batch)


def answerer(table, options, config, graph_file, tokenizer):
    """Scores of answers' ends by ONNX Runtime and by Optimum against those of transformers, on the windows of 200 awkward
    questions and texts; and the answers of `tk serve-batch` against those of transformers' pipeline."""
    directory, tolerance = options.directory, options.tolerance
    model = loaded(table, AutoModelForQuestionAnswering, directory)
    max_length = options.max_length or longest(directory, tokenizer, config)
    stride = min(max_length // 2, 128)
    rng = random.Random(42)
    questions = [awkward(rng, rng.randrange(1, 9), rng.choice(GAPS)) for _ in range(200)]
    texts = [awkward(rng, rng.randrange(1, 40) if i % 10 else 400, rng.choice(GAPS)) for i in range(200)]
    records = [dict(question=q, context=c) for q, c in zip(questions, texts)]
    room = max_length - tokenizer.num_special_tokens_to_add(True) - stride  # else the pipeline fails
    records = [r for r in records if len(tokenizer.tokenize(r["question"])) < room and tokenizer.tokenize(r["context"])]
    print(f"onnx {onnx.__version__}, ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, "
          f"transformers {transformers.__version__}; {len(records)} questions, at most {max_length} tokens each")  # fmt: skip
    check_graph(table, directory, graph_file, config)

    def windows_of(part, kind):
        cut = dict(truncation="only_second", max_length=max_length, stride=stride, return_overflowing_tokens=True)
        e = tokenizer([r["question"] for r in part], [r["context"] for r in part], padding=True, return_tensors=kind, **cut)
        return {name: e[name] for name in tokenizer.model_input_names if name in e}

    def ends_by(run, kind):
        found = []
        for at in range(0, len(records), BATCH):
            b = windows_of(records[at : at + BATCH], kind)
            for ends in zip(*run(b), b["attention_mask"]):
                *ends, mask = map(np.asarray, ends)
                found += [end[mask == 1] for end in ends]
        return found

    def by_model(model):
        def run(b):
            with torch.no_grad():
                output = model(**b)
            return output.start_logits.numpy(), output.end_logits.numpy()

        return ends_by(run, "pt")

    truth = by_model(model)

    def onnx_runtime():
        session = onnxruntime.InferenceSession(graph_file, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        run = lambda b: session.run(["start_logits", "end_logits"], {n: v for n, v in b.items() if n in wanted})
        compare(table, "ONNX Runtime against transformers", ends_by(run, "np"), truth, tolerance)

    def optimum():
        from optimum.onnxruntime import ORTModelForQuestionAnswering

        files = dict(subfolder="onnx", file_name="model.onnx", local_files_only=True)
        found = by_model(ORTModelForQuestionAnswering.from_pretrained(str(directory), **files))
        compare(table, "Optimum against transformers", found, truth, tolerance)

    def stripped(answers):
        """Answers without the space that a byte-level tokenizer with add_prefix_space leaves in front of a window's first
        token; those that are then the same are one."""
        merged = {}
        for a in answers:
            text = a["answer"].lstrip(" ")
            key = text.lower()
            a = dict(a, answer=text, start=a["start"] + len(a["answer"]) - len(text))
            merged[key] = dict(merged[key], score=merged[key]["score"] + a["score"]) if key in merged else a
        return sorted(merged.values(), key=lambda a: -a["score"])

    def answers():
        ask = pipeline("question-answering", model=model, tokenizer=tokenizer)
        none = getattr(config, "null_score_diff_threshold", None) is not None
        how = dict(top_k=20, max_answer_len=30, align_to_words=False, max_seq_len=max_length, doc_stride=stride)
        how["handle_impossible_answer"] = none
        flags = ["--top-k", "3", "--max-length", str(max_length)]
        wrong, count, worst = [], 0, 0.0
        for record, line in zip(records, serve(options.tk, directory, records, flags)):
            due = ask(**record, **how)
            due = [a for a in (due if isinstance(due, list) else [due]) if a["answer"] or none]
            found = [a for a in line.get("answers", []) if a["answer"] or not none]
            due = stripped(due)
            if none:  # the threshold, which the pipeline does not know, places no answer among the others
                due = [a for a in due if a["answer"]]
            # of answers that are as likely, either may be first
            for a, b in zip(found, due):
                same = [d for d in due if abs(d["score"] - a["score"]) <= tolerance]
                if not any((a["answer"], a["start"], a["end"]) == (d["answer"], d["start"], d["end"]) for d in same):
                    wrong.append(f"{record['question'][:30]!r}: {a}, not {b}")
                    break
                worst, count = max(worst, abs(a["score"] - b["score"])), count + 1
            if record["context"][line["start"] : line["end"]] != line["answer"]:
                wrong.append(f"{line} is no slice")
        found = f"{len(records) - len(wrong)} of {len(records)}, {count} answers, scores within {worst:.1e}"
        table.add("tk serve-batch's answers are the pipeline's", found + (f"; {wrong[0]}" if wrong else ""),
                  not wrong and count >= len(records) and worst <= tolerance)  # fmt: skip

    table.attempt("quantize_dynamic", lambda: quantizer(table, graph_file))
    table.attempt("ONNX Runtime against transformers", onnx_runtime)
    table.attempt("Optimum against transformers", optimum)
    table.attempt("tk serve-batch's answers are the pipeline's", answers)


def filler(table, options, config, graph_file, tokenizer):
    """Scores of masked places, and of pairs, by ONNX Runtime and by Optimum against those of transformers, on 200 awkward
    texts with masks, and pairs of them; and what `tk serve-batch` says against transformers' pipeline and softmax."""
    directory, tolerance = options.directory, options.tolerance
    kind, outputs = is_filler(config)
    model = loaded(table, kind, directory)
    max_length = options.max_length or longest(directory, tokenizer, config)
    check_graph(table, directory, graph_file, config)
    rng = random.Random(7)
    mask = tokenizer.mask_token
    texts = []
    while len(texts) < 200:
        parts = [awkward(rng, rng.randrange(0, 8), rng.choice(GAPS)) for _ in range(rng.randrange(2, 5))]
        text = f" {mask} ".join(parts)
        if len(tokenizer(text)["input_ids"]) <= max_length:
            texts.append(text)
    masked = any(of == "vocabulary" for _, _, of in outputs)
    paired = any(of == "pair" for _, _, of in outputs)
    records = [{"text": text, "text_pair": texts[i - 1] or "a"} for i, text in enumerate(texts)] if paired else [{"text": text} for text in texts]

    def run(call):
        """Each record's outputs, of tokens those of its masks alone."""
        found = [[] for _ in outputs]
        with torch.no_grad():
            for b in batches(tokenizer, records, max_length, "pt"):
                for own, (values, (_, _, of)) in zip(found, zip(call(b), outputs)):
                    for row, ids in zip(np.asarray(values), b["input_ids"].numpy()):
                        own.append(row[ids == tokenizer.mask_token_id].reshape(-1) if of == "vocabulary" else row)
        return found

    truth = run(lambda b: [model(**b)[name] for _, name, _ in outputs])

    def held(what, found):
        for (name, _, _), a, b in zip(outputs, found, truth):
            some = [(x, y) for x, y in zip(a, b) if y.size or x.size]
            compare(table, f"{what} against transformers: {name}", [x for x, _ in some], [y for _, y in some], tolerance)

    def onnx_runtime():
        session = onnxruntime.InferenceSession(graph_file, providers=["CPUExecutionProvider"])
        wanted = [i.name for i in session.get_inputs()]
        names = [name for name, _, _ in outputs]
        held("ONNX Runtime", run(lambda b: session.run(names, {n: b[n].numpy() for n in wanted})))

    def optimum():
        from optimum.onnxruntime import ORTModelForMaskedLM

        loaded = ORTModelForMaskedLM.from_pretrained(
            str(directory), subfolder="onnx", file_name="model.onnx", local_files_only=True
        )
        held("Optimum", run(lambda b: [loaded(**b).logits]))

    def fills():
        ask = pipeline("fill-mask", model=AutoModelForMaskedLM.from_pretrained(directory).eval(), tokenizer=tokenizer)
        wrong, worst, count = [], 0.0, 0
        lines = serve(options.tk, directory, [{"text": text} for text in texts], [])
        for text, line in zip(texts, lines):
            said = ask(text)
            said = [said] if isinstance(said[0], dict) else said
            own = line.get("fills", [])
            if len(own) != len(said):
                wrong.append(f"{text!r}: {line}")
                continue
            for a, b in zip(own, said):
                count += 1
                apart = max(abs(x["score"] - y["score"]) for x, y in zip(a, b, strict=True))
                worst = max(worst, apart)
                # of two that are as likely, either may stand first
                strangers = {x["token"] for x in a} ^ {y["token_str"] for y in b}
                if apart > 1e-4 or (strangers and a[-1]["score"] - b[-1]["score"] > 1e-5):
                    wrong.append(f"{text!r}: {a} {b}")
        table.add("tk serve-batch's fills are the pipeline's", f"{count} masks of {len(texts)} texts, scores within {worst:.1e}"
                  + (f"; {wrong[0]}" if wrong else ""), not wrong)  # fmt: skip

    def relations():
        place = [of for _, _, of in outputs].index("pair")
        due = torch.softmax(torch.tensor(np.array(truth[place])), -1).numpy()
        lines = serve(options.tk, directory, records, [])
        # of a pair that is cut, a mask may be lost: that is said
        told = [i for i, line in enumerate(lines) if "stand outside" not in line.get("error", "")]
        found = [np.array([lines[i]["scores"][name] for name in ("IsNext", "NotNext")]) for i in told]
        compare(table, "tk serve-batch's relations are transformers'", found, [due[i] for i in told], 1e-4)

    table.attempt("quantize_dynamic", lambda: quantizer(table, graph_file))
    table.attempt("ONNX Runtime against transformers", onnx_runtime)
    if kind is AutoModelForMaskedLM:
        table.attempt("Optimum against transformers", optimum)
    if masked:
        table.attempt("tk serve-batch's fills are the pipeline's", fills)
    if paired:
        table.attempt("tk serve-batch's relations are transformers'", relations)


def embedder(table, options, config, graph_file, tokenizer):
    """Embeddings of 1,000 awkward texts by ONNX Runtime and by `tk serve-batch` against the hidden states of transformers,
    pooled as the directory's files say."""
    directory, tolerance = options.directory, min(options.tolerance, 1e-5)
    model = AutoModel.from_pretrained(directory).eval()
    modules = [module["type"].rsplit(".")[-1] for module in json.loads((directory / "modules.json").read_text())]
    pooling = json.loads((directory / "1_Pooling/config.json").read_text())
    old = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
    mode = pooling.get("pooling_mode") or next(name for name, key in old.items() if pooling.get(key))
    length = json.loads((directory / "sentence_bert_config.json").read_text())["max_seq_length"]
    rng = random.Random(5)
    texts = AWKWARD + [awkward(rng, rng.randrange(0, 30), rng.choice(GAPS)) for _ in range(1000 - len(AWKWARD))]
    records = [{"text": text} for text in texts]

    def pooled(hidden, mask):
        mask = mask[..., None]
        if mode == "cls":
            rows = hidden[:, 0]
        elif mode == "max":
            rows = np.where(mask == 1, hidden, -np.inf).max(1)
        else:
            rows = (hidden * mask).sum(1) / mask.sum(1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if "Normalize" in modules else rows

    def run(call):
        found = []
        stripped = [{"text": r["text"].strip()} for r in records]  # as sentence-transformers does
        with torch.no_grad():
            for b in batches(tokenizer, stripped, length, "pt"):
                found += list(call(b))
        return found

    truth = run(lambda b: pooled(model(**b).last_hidden_state.numpy(), b["attention_mask"].numpy()))
    print(f"{len(texts)} texts, at most {length} tokens each; pooled by {mode}, {', '.join(modules)}")

    def onnx_runtime():
        session = onnxruntime.InferenceSession(graph_file, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        found = run(lambda b: session.run(["sentence_embedding"], {n: b[n].numpy() for n in names})[0])
        compare(table, "ONNX Runtime against transformers", found, truth, tolerance)

    def serve_batch():
        lines = serve(options.tk, directory, records, [])
        found = [np.array(line["embedding"], dtype=np.float32) for line in lines]
        compare(table, "tk serve-batch against transformers", found, truth, tolerance)

    def similarities():
        pairs = [{"text": a, "text_pair": b} for a, b in zip(texts, texts[1:])]
        lines = serve(options.tk, directory, pairs, [])
        norms = [row / np.linalg.norm(row) for row in truth]
        due = [np.array([a @ b]) for a, b in zip(norms, norms[1:])]
        found = [np.array([line["similarity"]]) for line in lines]
        compare(table, "tk serve-batch's similarities are cosines", found, due, tolerance)

    table.attempt("quantize_dynamic", lambda: quantizer(table, graph_file))
    table.attempt("ONNX Runtime against transformers", onnx_runtime)
    table.attempt("tk serve-batch against transformers", serve_batch)
    table.attempt("tk serve-batch's similarities are cosines", similarities)


def entities(table, tk, directory, tokenizer, model, max_length, tolerance):
    """What `tk serve-batch` finds in texts, against transformers' pipeline: kinds, places and scores. Of a text that is
    longer than the model, the pipeline is given each token's logits from the window that predicts it."""
    if getattr(model.config, "tag_scheme", None) == "bioes":
        print("entities are not compared: transformers' pipeline does not know BIOES", file=sys.stderr)
        return
    ner = pipeline("token-classification", model=model, tokenizer=tokenizer)
    rng = random.Random(42)
    texts = []
    while len(texts) < 300:
        text = awkward(rng, rng.randrange(1, 13), rng.choice(GAPS))
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        if own and len(own) + tokenizer.num_special_tokens_to_add() <= max_length:  # the pipeline fails where it has none
            texts.append(text)
    given = [words for words in (text.split() for text in texts) if all(tokenizer.tokenize(word) for word in words)]
    long = awkward(rng, 3000, [" "])

    def rows(found):
        """Kinds and places, and scores. The pipeline calls the kind entity_group where it aggregates."""
        return [(e.get("entity_group", e.get("entity")), e["start"], e["end"]) for e in found], [float(e["score"]) for e in found]

    def held(what, records, truths, aggregation, *flags):
        lines = serve(tk, directory, records, ["--aggregation", aggregation, "--max-length", str(max_length), *flags])
        wrong, count, worst = [], 0, 0.0
        for record, line, truth in zip(records, lines, truths, strict=True):
            (a, scores), (b, wanted) = rows(line["entities"]), rows(truth)
            text = record.get("text", " ".join(record.get("tokens", [])))
            if a != b or any(e["text"] != text[e["start"] : e["end"]] for e in line["entities"]):
                first = next((pair for pair in zip([*a, None], [*b, None]) if pair[0] != pair[1]), None)
                wrong.append(f"{text[:60]!r}: {first}")
            else:
                worst = max([worst, *(abs(x - y) for x, y in zip(scores, wanted))])
                count += len(a)
        found = f"{len(records) - len(wrong)} of {len(records)}, {count} entities, scores within {worst:.1e}"
        table.add(f"tk serve-batch's entities are the pipeline's: {what}, {aggregation}",
                  found + (f"; {wrong[0]}" if wrong else ""), not wrong and count and worst <= tolerance)  # fmt: skip
        return lines

    def of_texts(aggregation):
        truths = [ner(text, aggregation_strategy=aggregation) for text in texts]
        held("texts", [dict(text=text) for text in texts], truths, aggregation)

    def pipeline_of_words(words, aggregation):
        """What the pipeline makes of given words. It guesses at which tokens are of one word even then: it is told."""
        if aggregation in ("none", "simple"):
            return ner([words], aggregation_strategy=aggregation, is_split_into_words=True)[0]
        encoded = tokenizer(words, is_split_into_words=True, return_offsets_mapping=True, return_tensors="pt")
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        with torch.no_grad():
            scores = model(**{n: encoded[n] for n in ("input_ids", "attention_mask")}).logits[0].softmax(-1).numpy()
        pieces, before = [], None
        for at, word in enumerate(encoded.word_ids()):
            if word is not None:
                start, end = (starts[word] + encoded["offset_mapping"][0, at]).tolist()
                token = tokenizer.convert_ids_to_tokens(int(encoded["input_ids"][0, at]))
                pieces.append(dict(word=token, scores=scores[at], start=start, end=end, index=at, is_subword=word == before))
                before = word
        found = ner.aggregate(pieces, AggregationStrategy(aggregation))
        return [one for one in found if one["entity_group"] != "O"]

    def of_words(aggregation):
        truths = [pipeline_of_words(words, aggregation) for words in given]
        held("words", [dict(tokens=words) for words in given], truths, aggregation)

    @functools.cache
    def windowed():
        """The long text as the pipeline has it in front of postprocess, and its tokens' words."""
        encoded = tokenizer(long, add_special_tokens=False, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        nothing = np.zeros((len(ids), 1))
        pieces = ner.gather_pre_entities(
            long, np.array(ids), nothing, np.array(places), np.zeros(len(ids)), AggregationStrategy.FIRST
        )
        room = max_length - tokenizer.num_special_tokens_to_add()
        parts = windows([piece["is_subword"] for piece in pieces], room, room // 4)
        logits = torch.zeros(len(ids), model.config.num_labels)
        done = []
        for seen, predicted in parts:
            framed = tokenizer.build_inputs_with_special_tokens(ids[seen.start : seen.stop])
            before = tokenizer.build_inputs_with_special_tokens([-1]).index(-1)
            with torch.no_grad():
                found = model(input_ids=torch.tensor([framed])).logits[0]
            for at in predicted:
                logits[at] = found[before + at - seen.start]
            done += predicted
        assert done == list(range(len(ids)))
        whole = dict(logits=logits[None], sentence=long, input_ids=torch.tensor([ids]),
                     offset_mapping=torch.tensor([places]),
                     special_tokens_mask=torch.zeros(1, len(ids), dtype=torch.long))  # fmt: skip
        return whole, encoded.word_ids(), len(parts)

    def of_long(aggregation):
        whole, words, count = windowed()
        truth = ner.postprocess([dict(whole)], aggregation_strategy=AggregationStrategy(aggregation))
        [line] = held(f"a text of {count} windows", [dict(text=long)], [truth], aggregation, "--tags")
        if aggregation in ("none", "simple", "first"):
            best = whole["logits"][0].argmax(-1).tolist()
            tags = {}
            for at, word in enumerate(words):
                tags.setdefault(word, model.config.id2label[best[at]])
            due = [tags.get(word, "O") for word in range(max(w for w in words if w is not None) + 1)]
            same = sum(a == b for a, b in zip(line["tags"], due))
            table.add(f"tk serve-batch tags every word of it once: {aggregation}", f"{same} of {len(due)} words",
                      line["tags"] == due)  # fmt: skip

    def of_long_words():
        tokens = long.split()
        [line] = serve(tk, directory, [dict(tokens=tokens)], ["--tags", "--max-length", str(max_length)])
        table.add("tk serve-batch tags every given word once", f"{len(line['tags'])} of {len(tokens)}",
                  len(line["tags"]) == len(tokens))  # fmt: skip

    for aggregation in AGGREGATIONS:
        for check in (of_texts, of_words, of_long):
            table.attempt(f"entities, {check.__name__}, {aggregation}", functools.partial(check, aggregation))
    table.attempt("tags of given words", of_long_words)


def main():
    parser = argparse.ArgumentParser(prog="check-ecosystem", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="what tk train and tk export wrote")
    parser.add_argument("--input", type=Path, help="a .jsonl file whose texts are compared as well")
    parser.add_argument("--limit", type=int, default=500, help="at most so many of its records (default: 500)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of logits (default: 1e-4)")
    parser.add_argument("--max-length", type=int, help="tokens (default: as the model was trained)")
    parser.add_argument("--tk", type=Path, default=ROOT / "target/release/tk", help="the tk binary")
    options = parser.parse_args()
    directory = options.directory
    graph_file = directory / "onnx/model.onnx"
    for file in (directory / "config.json", directory / "model.safetensors", graph_file, options.tk):
        if not file.is_file():
            parser.error(f"{file} is missing")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    records = [{"text": text} for text in AWKWARD]
    if options.input:
        lines = [json.loads(line) for line in options.input.read_text().splitlines() if line.strip()]
        records += lines[: options.limit]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    table = Table()
    config = AutoConfig.from_pretrained(directory)
    if (directory / "modules.json").is_file():
        embedder(table, options, config, graph_file, tokenizer)
    elif config.architectures[0].endswith("LMHeadModel"):
        language_model(table, options.tk, directory, graph_file, tokenizer, records)
    elif is_filler(config):
        filler(table, options, config, graph_file, tokenizer)
    elif is_answerer(config):
        answerer(table, options, config, graph_file, tokenizer)
    else:
        records = [r for r in records if tokenizer(r["text"])["input_ids"]]  # GPT-2 has no token for an empty text
        classifier(table, options, config, graph_file, tokenizer, records)
    sys.exit(1 if table.print() else 0)


if __name__ == "__main__":
    main()
