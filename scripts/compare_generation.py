"""A model of GPT-2's size comes in; how fast other runtimes generate with it goes out, a JSON line a batch.

Run by scripts/compare-generation, which makes the Python environment and pins the cores. Everything lies in one
directory: model/, what the runtimes read instead of it, and in results/ what was measured.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import logging
import math
import os
import random
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"
VOCABULARY = 50257
CONTEXT = 256  # positions of a sequence, where a runtime asks
PEERS = {
    "transformers": ["fp32"],
    "optimum": ["fp32"],
    "ctranslate2": ["fp32", "int8"],
    "llama.cpp": ["F32", "Q8_0", "Q4_0"],
}
TK = ["fp32", "q8", "q4"]
NAMES = {"optimum": "Optimum + ONNX Runtime", "ctranslate2": "CTranslate2"}


def say(text):
    print(text, file=sys.stderr, flush=True)


def read(file):
    return json.loads(file.read_text())


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# The model, and what the runtimes read instead of it


@contextlib.contextmanager
def made(path):
    """A path to write to for the block; it is in its place afterwards, whole."""
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    began = time.monotonic()
    yield partial
    partial.replace(path)
    say(f"{path}: made in {time.monotonic() - began:.1f} s")


def documents():
    folder = ROOT / ".deps/data/bbc"
    return [record["text"] for name in ("train", "test") for record in read_lines(folder / f"{name}.jsonl")]


def new_model(folder, tiny):
    """A GPT-2 of random weights, with a tokenizer of as many tokens, as `transformers` saves them."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents(), vocab_size=VOCABULARY - 1, min_frequency=1, show_progress=False)
    bpe.save_model(str(folder))
    vocabulary = read(folder / "vocab.json")
    for i in range(len(vocabulary), VOCABULARY - 1):
        vocabulary[f"unused{i}"] = i  # where the texts gave too few; no merge leads there
    vocabulary[END] = VOCABULARY - 1
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=1024)
    tokenizer.save_pretrained(folder)
    # Wider than GPT-2's 0.02: with that the likeliest token is nearly always the last one again.
    size = dict(n_layer=2, n_embd=64, n_head=2) if tiny else {}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(initializer_range=0.05, n_ctx=1024, **size))
    with torch.no_grad():
        model.transformer.wte.weight[VOCABULARY - 1] = 0  # scores 0, so it is never the likeliest: nothing ends early
    model.save_pretrained(folder)


def to_onnx(model, folder):
    from optimum.exporters.onnx import main_export

    main_export(str(model), folder, task="text-generation-with-past", do_validation=False)


def to_ctranslate2(model, folder, quantization):
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(model)).convert(str(folder), quantization=quantization)


def to_gguf(model, file, converter):
    """By llama.cpp's own converter, of the sources that llama-cpp-python was built from."""
    sys.path.insert(0, str(converter))
    import convert_hf_to_gguf as convert
    from conversion.base import TextModel

    # It knows tokenizers by a hash of what they make of a text, so no new one. This one cuts words as GPT-2's does.
    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = ["convert_hf_to_gguf.py", str(model), "--outfile", str(file), "--outtype", "f32"]
    convert.main()


def to_blocks(source, file, precision):
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    how = llama_cpp.llama_model_quantize_default_params()
    how.nthread = len(os.sched_getaffinity(0))
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{precision}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(how)) != 0:
        sys.exit(f"llama.cpp could not make {file}")


def gguf_bytes(file, converter):
    """The bytes of the tensors that a step reads, and the types of the matrices."""
    sys.path.insert(0, str(converter / "gguf-py"))
    from gguf import GGUFReader

    tensors = {t.name: t for t in GGUFReader(file).tensors}
    # Of these tables a step reads a row; the one of tokens is the head too where there is no other.
    tables = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in tensors else set())
    kinds = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) > 1 and name not in tables:
            kind = "layers" if name.startswith("blk.") else name
            kinds.setdefault(kind, set()).add(tensor.tensor_type.name)
    told = ", ".join(f"{kind} {'/'.join(sorted(of))}" for kind, of in sorted(kinds.items()))
    return sum(int(t.n_bytes) for name, t in tensors.items() if name not in tables), told


def prepare(o):
    """Makes what is not there yet."""
    model = o.dir / "model"
    if not model.exists():
        with made(model) as partial:
            new_model(partial, o.tiny)
    if not (o.dir / "optimum").exists():
        with made(o.dir / "optimum") as partial:
            to_onnx(model, partial)
    for precision in PEERS["ctranslate2"]:
        folder = o.dir / f"ctranslate2-{precision}"
        if not folder.exists():
            with made(folder) as partial:
                to_ctranslate2(model, partial, {"fp32": "float32"}.get(precision, precision))
    files = {precision: o.dir / f"{precision}.gguf" for precision in PEERS["llama.cpp"]}
    for precision, file in files.items():
        if not file.exists():
            with made(file) as partial:
                if precision == "F32":
                    to_gguf(model, partial, o.converter)
                else:
                    to_blocks(files["F32"], partial, precision)
    sizes = {}
    for precision, file in files.items():
        sizes[precision], types = gguf_bytes(file, o.converter)
        say(f"{file}: {file.stat().st_size / 1e6:.1f} MB, {sizes[precision] / 1e6:.1f} MB a step: {types}")
    (o.dir / "gguf.json").write_text(json.dumps(sizes))
    write_prompts(o)


def write_prompts(o):
    """Texts of so many tokens, which the tokenizer gives again: of --prompt tokens, and the mixed ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(o.dir / "model")
    texts = itertools.cycle(documents())
    rng = random.Random(7)

    def prompt(length):
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            at = rng.randrange(max(1, len(ids) - length))
            ids = ids[at : at + length]
            if len(ids) == length and tokenizer(tokenizer.decode(ids))["input_ids"] == ids:
                return ids

    even = [prompt(o.prompt) for _ in range(max(o.batch))]
    (o.dir / "prompts.json").write_text(json.dumps(even))
    lengths = [(rng.randint(8, 400), rng.randint(16, 128)) for _ in range(o.prompts)]
    mixed = [(prompt(length), new) for length, new in lengths]
    (o.dir / "mixed.json").write_text(json.dumps(mixed))
    lines = (json.dumps(dict(prompt=tokenizer.decode(ids), max_new_tokens=new)) for ids, new in mixed)
    (o.dir / "mixed-prompts.jsonl").write_text("".join(line + "\n" for line in lines))


# The runtimes


def fp32_bytes(o):
    """Of all weights but the table of positions, of which a step reads a row."""
    from safetensors import safe_open

    with safe_open(o.dir / "model/model.safetensors", "np") as file:
        return 4 * sum(math.prod(file.get_slice(n).get_shape()) for n in file.keys() if not n.endswith("wpe.weight"))


class Generate:
    """transformers' generate(), of PyTorch's model or of Optimum's."""

    def __init__(self, o):
        import torch

        self.torch, self.bytes = torch, fp32_bytes(o)
        if o.runtime == "optimum":
            import onnxruntime
            from optimum.onnxruntime import ORTModelForCausalLM

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = o.threads
            # With I/O binding, which is not Optimum's default on CPUs, large batches are faster and small ones as fast.
            how = dict(session_options=options, use_io_binding=True)
            self.model = ORTModelForCausalLM.from_pretrained(str(o.dir / "optimum"), **how)
        else:
            from transformers import AutoModelForCausalLM

            self.model = AutoModelForCausalLM.from_pretrained(o.dir / "model").eval()
        torch.set_num_threads(o.threads)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = VOCABULARY - 1

    def generate(self, prompts, new, at):
        """Greedy tokens; `at` takes the time of each step's logits."""

        def processor(_, logits):
            at.append(time.perf_counter())
            return logits

        width = max(map(len, prompts))
        ids = self.torch.tensor([[VOCABULARY - 1] * (width - len(p)) + p for p in prompts])
        mask = self.torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        how = dict(max_new_tokens=new, do_sample=False, logits_processor=[processor])
        with self.torch.inference_mode():
            return self.model.generate(ids, attention_mask=mask, **how)[:, width:].tolist()

    def measure(self, prompts, new):
        at, began = [], time.perf_counter()
        tokens = self.generate(prompts, new, at)
        return at[0] - began, at[-1] - at[0], tokens

    def mixed(self, asked):
        """Batches padded on the left, each of which runs to the longest text that it was asked for. So those of about
        as many new tokens go together; sorted by their prompts' lengths they take up to a fifth longer."""
        rows = sorted(range(len(asked)), key=lambda i: asked[i][1], reverse=True)
        for size in (8, 16):
            tokens, began = {}, time.perf_counter()
            for at in range(0, len(rows), size):
                batch = rows[at : at + size]
                found = self.generate([asked[i][0] for i in batch], asked[batch[0]][1], [])
                tokens.update({i: of[: asked[i][1]] for i, of in zip(batch, found)})
            yield f"batches of {size}", time.perf_counter() - began, [tokens[i] for i in range(len(asked))]


class CTranslate2:
    def __init__(self, o):
        import ctranslate2
        from transformers import AutoTokenizer

        folder, config = o.dir / f"ctranslate2-{o.precision}", read(o.dir / "model/config.json")
        self.bytes = (folder / "model.bin").stat().st_size - 4 * config["n_positions"] * config["n_embd"]
        self.words = AutoTokenizer.from_pretrained(o.dir / "model").convert_ids_to_tokens
        kind = {"fp32": "float32"}.get(o.precision, o.precision)
        self.generator = ctranslate2.Generator(str(folder), compute_type=kind, intra_threads=o.threads)

    def generate(self, prompts, new, **how):
        how = dict(max_length=new, include_prompt_in_result=False, **how)
        return [found.sequences_ids[0] for found in self.generator.generate_batch(prompts, **how)]

    def measure(self, prompts, new):
        """By its callback for each token: as fast as without, measured by calls for one and for all new tokens."""
        at, prompts = [], [self.words(ids) for ids in prompts]
        began = time.perf_counter()
        tokens = self.generate(prompts, new, callback=lambda _: at.append(time.perf_counter()))
        return at[0] - began, at[-1] - at[0], tokens

    def mixed(self, asked):
        """One call with all prompts: CTranslate2 sorts them by length and makes the batches. It takes one number of new
        tokens for all of them, but a text leaves its batch where the callback says so, at its own number. What it pays
        is that prompts of unlike length are read at once as far as the shortest goes, then a token a step. Two batches
        side by side, a thread each, are no faster."""
        prompts, news = [self.words(ids) for ids, _ in asked], [new for _, new in asked]
        for size in (8, 16, 32):
            count = [0] * len(asked)

            def done(step):
                count[step.batch_id] += 1
                return count[step.batch_id] >= news[step.batch_id]

            began = time.perf_counter()
            tokens = self.generate(prompts, max(news), max_batch_size=size, batch_type="examples", callback=done)
            yield f"batches of {size}", time.perf_counter() - began, tokens


class Llama:
    """llama.cpp's own functions: its Python class has no batches."""

    def __init__(self, o):
        import llama_cpp
        import numpy

        self.api, self.np, self.threads = llama_cpp, numpy, o.threads
        self.bytes = read(o.dir / "gguf.json")[o.precision]
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        file = o.dir / f"{o.precision}.gguf"
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        self.context, self.shape = None, None

    def open(self, batch, length):
        """A context of so many sequences, with llama.cpp's defaults: flash attention, keys and values in f16. None of
        its other ways was faster; in f16 a token differs from transformers' now and then."""
        if self.shape == (batch, length):
            return
        if self.context:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)
        how = self.api.llama_context_default_params()
        how.n_ctx, how.n_seq_max = batch * CONTEXT, batch
        how.n_batch = max(how.n_batch, batch * length)
        how.n_threads = how.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, how)
        self.batch = self.api.llama_batch_init(batch * length, 0, 1)
        self.shape = batch, length

    def decode(self, ids, positions, rows, wanted):
        """The likeliest tokens behind those whose logits are wanted."""
        count = len(ids)
        self.batch.n_tokens = count
        columns = self.batch.token, self.batch.pos, self.batch.n_seq_id, self.batch.logits
        for column, values in zip(columns, (ids, positions, 1, wanted)):
            self.np.ctypeslib.as_array(column, (count,))[:] = values
        for i, row in enumerate(rows):
            self.batch.seq_id[i][0] = row
        if self.api.llama_decode(self.context, self.batch) != 0:
            sys.exit("llama.cpp could not decode a batch")
        logits = self.api.llama_get_logits(self.context)
        return self.np.ctypeslib.as_array(logits, (int(sum(wanted)), VOCABULARY)).argmax(1)

    def measure(self, prompts, new):
        batch, length = len(prompts), len(prompts[0])
        self.open(batch, length)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        began = time.perf_counter()
        ids, rows = self.np.concatenate(prompts), self.np.repeat(range(batch), length)
        positions, last = self.np.tile(range(length), batch), [0] * (length - 1) + [1]
        found = [self.decode(ids, positions, rows, last * batch)]
        first = time.perf_counter()
        for step in range(new - 1):
            found.append(self.decode(found[-1], [length + step] * batch, range(batch), [1] * batch))
        return first - began, time.perf_counter() - first, self.np.stack(found, 1).tolist()


RUNTIMES = {"transformers": Generate, "optimum": Generate, "ctranslate2": CTranslate2, "llama.cpp": Llama}


def run(o):
    """Batches of prompts of one length, a line each."""
    runtime = RUNTIMES[o.runtime](o)
    prompts = read(o.dir / "prompts.json")
    for batch in o.batch:
        runtime.measure(prompts[:batch], o.new)  # the first one allocates
        runs = [runtime.measure(prompts[:batch], o.new) for _ in range(o.repeat)]
        tokens = runs[0][2]
        if any(len(of) != o.new for of in tokens):
            sys.exit(f"{o.runtime} gave {[len(of) for of in tokens]} tokens, not {o.new} each")
        prefills, rates = [first for first, _, _ in runs], [batch * (o.new - 1) / rest for _, rest, _ in runs]
        line = dict(
            runtime=o.runtime, precision=o.precision, batch=batch, prefill_seconds=statistics.median(prefills),
            decode_tokens_per_second=statistics.median(rates), best_prefill_seconds=min(prefills),
            best_decode_tokens_per_second=max(rates), bytes_per_step=runtime.bytes, tokens=tokens,
        )  # fmt: skip
        print(json.dumps(line), flush=True)


def mixed(o):
    """Prompts and texts of all lengths, answered once for each size of batches, a line each."""
    asked = [tuple(pair) for pair in read(o.dir / "mixed.json")]
    for how, seconds, tokens in RUNTIMES[o.runtime](o).mixed(asked):
        if [len(of) for of in tokens] != [new for _, new in asked]:
            sys.exit(f"{o.runtime}, {how}: not as many tokens as asked for")
        line = dict(runtime=o.runtime, precision=o.precision, how=how, seconds=seconds, tokens=tokens)
        print(json.dumps(line), flush=True)


def bandwidth(o):
    """Bytes a second that the cores read: the best of some ways to go through 1 GB."""
    import torch

    torch.set_num_threads(o.threads)
    table = torch.ones(2**28)
    best = 0
    for way in (table.sum, table.max, table.aminmax):
        for _ in range(7):
            began = time.perf_counter()
            way()
            best = max(best, table.numel() * 4 / (time.perf_counter() - began))
    print(json.dumps(dict(bytes_per_second=best)))


# The table


def label(runtime):
    return NAMES.get(runtime, runtime)


def row(*cells):
    print("| " + " | ".join(cells) + " |")


def same_tokens(rows, truth):
    """Tokens up to the first that differs from transformers', of those of all prompts of the largest batch."""
    batch = max(truth)
    ours, theirs = rows[batch]["tokens"], truth[batch]["tokens"]
    same = sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))) for a, b in zip(ours, theirs))
    return f"{same} of {sum(map(len, theirs))}"


def table(o):
    results = {}  # (runtime, precision) -> batch -> line
    for runtime, precisions in {**PEERS, "tk": TK}.items():
        for precision in precisions:
            lines = read_lines(o.dir / f"results/{runtime}-{precision}.jsonl")
            if lines:
                results[runtime, precision] = {line["batch"]: line for line in lines}
    speed = max(read(o.dir / f"results/bandwidth-{when}.json")["bytes_per_second"] for when in ("before", "after"))
    batches = [b for b in o.batch if all(b in rows for rows in results.values())]
    print(f"\n{o.prompt} tokens in, {o.new} out, {o.threads} threads that read {speed / 1e9:.1f} GB/s; medians of "
          f"{o.repeat} runs\n")  # fmt: skip
    of = [f"batch {b}" for b in batches]
    row("runtime", "precision", *(f"decode, {b}: tokens/s" for b in of), *(f"prefill, {b}: ms" for b in of),
        "MB a step", "share of the bandwidth, batch 1")  # fmt: skip
    row("---", "---", *["---:"] * (2 * len(batches) + 2))
    for (runtime, precision), rows in results.items():
        weights, steps = rows[batches[0]].get("bytes_per_step"), rows.get(1, {}).get("decode_tokens_per_second")
        row(label(runtime), precision, *(f"{rows[b]['decode_tokens_per_second']:.1f}" for b in batches),
            *(f"{1e3 * rows[b]['prefill_seconds']:.1f}" for b in batches),
            f"{weights / 1e6:.1f}" if weights else "–",
            f"{weights * steps / speed:.0%}" if weights and steps else "–")  # fmt: skip

    print()
    truth = results.get(("transformers", "fp32"))
    for key in (("optimum", "fp32"), ("ctranslate2", "fp32"), ("llama.cpp", "F32"), ("tk", "fp32")):
        if truth and key in results:
            print(f"{label(key[0])}'s tokens are transformers': {same_tokens(results[key], truth)}")
    ratios(results, batches)


def ratios(results, batches):
    def ratio(ours, *peers):
        peers = [peer for peer in peers if peer in results]
        if ours not in results or not peers:
            return
        cells = []
        for field, invert in (("decode_tokens_per_second", False), ("prefill_seconds", True)):
            for b in batches:
                mine, theirs = results[ours][b][field], [results[peer][b][field] for peer in peers]
                cells.append(f"{min(theirs) / mine if invert else mine / max(theirs):.2f}")
        half = len(batches)
        name = " or ".join(f"{label(runtime)} {precision}" for runtime, precision in peers)
        better = f"the better of {name}" if len(peers) > 1 else name
        print(f"tk {ours[1]} over {better}: decode {', '.join(cells[:half])}; prefill {', '.join(cells[half:])}")

    ratio(("tk", "fp32"), ("optimum", "fp32"))
    ratio(("tk", "fp32"), ("transformers", "fp32"))
    ratio(("tk", "fp32"), ("llama.cpp", "F32"), ("ctranslate2", "fp32"))
    ratio(("tk", "q8"), ("llama.cpp", "Q8_0"))
    ratio(("tk", "q8"), ("ctranslate2", "int8"))
    ratio(("tk", "q4"), ("llama.cpp", "Q4_0"))
    ratio(("tk", "q4"), ("optimum", "fp32"))


def mixed_table(o):
    from transformers import AutoTokenizer

    asked = read(o.dir / "mixed.json")
    total = sum(new for _, new in asked)
    decode = AutoTokenizer.from_pretrained(o.dir / "model").decode
    rows, texts = [], {}
    for runtime in ("transformers", "ctranslate2"):
        for line in read_lines(o.dir / f"results/mixed-{runtime}.jsonl"):
            rows.append((runtime, line["how"], line["seconds"]))
            texts[runtime] = [decode(tokens) for tokens in line["tokens"]]
    taken = o.dir / "results/mixed-tk.json"
    if taken.exists():
        lines = read_lines(o.dir / "results/mixed-tk.jsonl")
        if [line.get("tokens") for line in lines] != [new for _, new in asked]:
            sys.exit("tk: not as many tokens as asked for")
        own = read(taken)
        rows.append(("tk", f"the whole process; {own['seconds']:.1f} s of it behind loading", own["process_seconds"]))
        texts["tk"] = [line["text"] for line in lines]

    lengths, news = [len(ids) for ids, _ in asked], [new for _, new in asked]
    print(f"\n{len(asked)} prompts of {min(lengths)} to {max(lengths)} tokens, {min(news)} to {max(news)} new ones "
          f"each, {total} together; fp32, {o.threads} threads\n")  # fmt: skip
    row("runtime", "how", "seconds", "new tokens/s")
    row("---", "---", "---:", "---:")
    for runtime, how, seconds in rows:
        row(label(runtime), how, f"{seconds:.1f}", f"{total / seconds:.1f}")
    print()
    for runtime in texts:
        if runtime != "transformers" and "transformers" in texts:
            same = sum(a == b for a, b in zip(texts[runtime], texts["transformers"]))
            print(f"{label(runtime)}'s texts are transformers': {same} of {len(asked)}")
    best = {}
    for runtime, _, seconds in rows:
        best[runtime] = min(seconds, best.get(runtime, seconds))
    for runtime, seconds in best.items():
        if runtime != "tk" and "tk" in best:
            print(f"tk over {label(runtime)} at its best: {seconds / best['tk']:.2f}")


def main():
    parser = argparse.ArgumentParser(prog="compare_generation.py", description=__doc__.splitlines()[0])
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("what", choices=["prepare", "bandwidth", "run", "mixed", "table", "mixed-table"])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--converter", type=Path, help="llama.cpp's sources")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--runtime", choices=list(RUNTIMES))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    o = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    {
        "prepare": prepare, "bandwidth": bandwidth, "run": run, "mixed": mixed, "table": table,
        "mixed-table": mixed_table,
    }[o.what](o)  # fmt: skip


if __name__ == "__main__":
    main()
