"""A tk comes in; what it does when it is killed, when the disk is full, when a model's files are broken and when clients are
rude goes out, a line a check. See scripts/check-reliability."""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mutants
import rude_clients

ROOT = Path(__file__).resolve().parent.parent
TK = os.environ.get("TK", str(ROOT / "target/release/tk"))
# a process that computes for longer hangs; one that waits for longer, too
CPU_SECONDS, WALL_SECONDS = 60, float(os.environ.get("TK_CHECK_WALL_SECONDS", "120"))
MEMORY = 3 << 30
TEXTS = ["a good film", "bad", "the plot was great and the cast was not", "no", "I do not know what this is about", "the end",
         "naïve café 😀 中文", "great great great", "it is what it is", ""]


class Finished:
    """A process that has ended."""

    def __init__(self, code, out, err, rss, timed_out):
        self.code, self.out, self.err, self.rss, self.timed_out = code, out, err, rss, timed_out

    def wrong(self, allowed=(0, 1, 2)):
        """What no run may do, if it did."""
        if self.timed_out:
            return f"hangs (stopped after {WALL_SECONDS:.0f} s)"
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}: {self.said()}"
        if "panicked at" in self.err or "broke down" in self.err or self.code == 101:
            return f"panics: {self.said()}"
        if self.rss > MEMORY:
            return f"takes {self.rss / 1e9:.1f} GB"
        if self.code not in allowed:
            return f"exit code {self.code}, expected one of {allowed}: {self.said()}"
        return None

    def said(self):
        return " | ".join(self.err.strip().splitlines()[-3:])[:400]


def limits(file_size=None):
    def apply():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
        if file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return apply


def tk(*args, file_size=None, stdin=None):
    """Runs tk to its end."""
    command = [TK, *map(str, args)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=stdin or subprocess.DEVNULL,
                                   preexec_fn=limits(file_size))
        ends, timed_out = time.monotonic() + WALL_SECONDS, False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > ends and not timed_out:
                timed_out = True
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.002)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return Finished(process.returncode, out.read(), err.read().decode(errors="replace"), usage.ru_maxrss * 1024,
                        timed_out)


class Checks:
    """What was found, a line a check."""

    def __init__(self):
        self.failed = 0

    def tell(self, name, problems, about=""):
        self.failed += bool(problems)
        print(f"{'FAILED' if problems else 'ok':<7}{name}{': ' + about if about else ''}", flush=True)
        for problem in problems[:8]:
            print(f"         {problem}", flush=True)
        if len(problems) > 8:
            print(f"         and {len(problems) - 8} more", flush=True)


def copied(name, folder):
    """An exported copy of one of models/."""
    target = folder / name
    shutil.copytree(ROOT / "models" / name, target)
    return exported(target)


def exported(target, *flags):
    done = tk("export", "--quiet", target, *flags)
    if done.code != 0:
        sys.exit(f"tk export {target} {' '.join(flags)} fails: {done.said()}")
    return target


def write_records(path, records):
    if path.suffix == ".csv":
        lines = [",".join(records[0])] + [",".join('"%s"' % str(v).replace('"', '""') for v in r.values()) for r in records]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- a run that is killed ----------------------------------------------------------------------------------------------


def killed(checks, work, draw, models, count):
    texts = [{"text": f"{TEXTS[i % len(TEXTS)]} {'word ' * (i * 7 % 23)}", "id": i} for i in range(count)]
    prompts = [{"prompt": f"{TEXTS[i % 9]}", "id": i} for i in range(300)]
    jsonl, csv = write_records(work / "in.jsonl", texts), write_records(work / "in.csv", texts)
    asked = write_records(work / "prompts.jsonl", prompts)
    flags = ["--window", "16", "--quiet"]
    for name, model, source, output, more in [
        ("jsonl → jsonl", models["classifier"], jsonl, "out.jsonl", ["--logits"]),
        ("csv → jsonl", models["classifier"], csv, "csv.jsonl", []),
        ("jsonl → npy", models["embedder"], jsonl, "out.npy", []),
        ("csv → parquet", models["embedder"], csv, "out.parquet", []),
        ("prompts → texts", models["generator"], asked, "texts.jsonl", ["--max-new-tokens", "12", "--temperature", "0.8"]),
    ]:
        whole, output = work / f"whole-{output}", work / output
        command = ["serve-batch", model, "--input", source, *flags, *more]
        began = time.monotonic()
        done = tk(*command, "--output", whole)
        took = time.monotonic() - began
        problems = [f"unbroken: {done.said()}"] if done.code else []
        kills = midway = 0
        for _ in range(0 if problems else 6):
            attempts = 0
            while not output.exists():
                attempts += 1
                process = subprocess.Popen([TK, *map(str, command), "--output", output, "--resume"],
                                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(draw.uniform(0, took / 2) if attempts < 10 else None)
                process.send_signal(signal.SIGKILL)
                _, said = process.communicate()
                if process.returncode == -signal.SIGKILL:
                    kills += 1
                    midway += any(work.glob(f"{output.name}.partial*"))
                elif process.returncode:
                    problems.append(f"resumed: exit code {process.returncode}: {said.decode(errors='replace')[-300:]}")
                    break
            if not output.exists():
                break
            if output.read_bytes() != whole.read_bytes():
                problems.append(f"other bytes after {kills} kills")
            if left := list(work.glob(f"{output.name}.*")):
                problems.append(f"left behind: {[path.name for path in left]}")
            output.unlink()
        checks.tell(f"killed and resumed, {name}", problems, f"{kills} kills, {midway} of them with an output begun")


# ---- disks and pipes ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
    """A disk of so many bytes; none where it can't be mounted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    try:
        yield folder if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=False)
        folder.rmdir()


def disks(checks, work, models):
    texts = write_records(work / "many.jsonl", [{"text": TEXTS[i % 9], "id": i} for i in range(4000)])
    for suffix, model in [("jsonl", "classifier"), ("npy", "embedder"), ("parquet", "embedder")]:
        command = ["serve-batch", models[model], "--input", texts, "--quiet", "--window", "64"]
        whole = work / f"disk-whole.{suffix}"
        problems = [tk(*command, "--output", whole).wrong(allowed=(0,))]
        with small_disk(work / f"disk-{suffix}", "200k") as disk:
            how = "a disk of 200 kB"
            if disk:
                output = disk / f"out.{suffix}"
                full = tk(*command, "--output", output)
            else:
                how, output = "files of 100 kB at most (no disk can be mounted)", work / f"limited.{suffix}"
                full = tk(*command, "--output", output, file_size=100_000)
            problems.append(full.wrong(allowed=(1,)))
            if output.exists():
                problems.append("something stands under the final name")
            if not any(word in full.err for word in ("No space left", "File too large")):
                problems.append(f"does not say why: {full.said()}")
            if disk:
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=False)
            problems.append(tk(*command, "--output", output, "--resume").wrong(allowed=(0,)))
            if not output.exists() or output.read_bytes() != whole.read_bytes():
                problems.append("resumed on a disk with room: other bytes")
        checks.tell(f"full disk, {suffix}", [p for p in problems if p], how)

    command = ["serve-batch", models["classifier"], "--input", texts, "--quiet"]
    full = tk(*command, "--output", "/dev/full")
    checks.tell("full device", [p for p in [full.wrong(allowed=(1,))] if p], full.said())

    reader = subprocess.Popen([TK, *map(str, command), "--window", "16"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = reader.stdout.readline()
    reader.stdout.close()
    said = reader.stderr.read().decode()
    code = reader.wait()
    problems = [] if code == 0 else [f"exit code {code}: {said}"]
    problems += [] if json.loads(first)["id"] == 0 else ["another first line"]
    problems += [f"says {said}"] if said else []
    checks.tell("a reader that goes after a line (head -1)", problems)

    problems = []
    with small_disk(work / "read-only", "1m") as disk:
        if disk:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=False)
        for folder in filter(None, [disk, Path("/proc")]):
            done = tk(*command, "--output", folder / "out.jsonl")
            problems += [p for p in [done.wrong(allowed=(1, 2))] if p]
            if str(folder) not in done.err:
                problems.append(f"does not name the place: {done.said()}")
    checks.tell("an output that can't be written", problems, done.said())

    problems = []
    for name, model in [("out.jsonl", "classifier"), ("out.npy", "embedder")]:
        folder = work / f"vanishes-{model}"
        folder.mkdir()
        command = [TK, "serve-batch", models[model], "--input", texts, "--quiet", "--window", "16", "--threads", "1",
                   "--output", folder / name]
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, preexec_fn=limits())
        while process.poll() is None and not any(folder.iterdir()):
            time.sleep(0.001)
        shutil.rmtree(folder, ignore_errors=True)
        _, said = process.communicate()
        said = said.decode(errors="replace")
        if process.returncode != 1 or "panicked" in said or str(folder) not in said:
            problems.append(f"exit code {process.returncode}: {said[-300:]}")
    checks.tell("an output's folder that vanishes", problems, said.strip()[-160:])

    problems = []
    for flags in [[], ["--external-data"]]:
        with small_disk(work / "export", "900k") as disk:
            if disk is None:
                continue
            model = disk / "model"
            shutil.copytree(ROOT / "models/tiny-bert-single", model, ignore=shutil.ignore_patterns("*s*_steps.*", "grad*"))
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(free - 60_000))
            done = tk("export", model, *flags)
            problems += [p for p in [done.wrong(allowed=(1, 2))] if p]
            left = [path.name for path in (model / "onnx").iterdir()] if (model / "onnx").exists() else []
            left += [path.name for path in model.iterdir() if path.name.startswith(".")]
            if left:
                problems.append(f"an export that failed leaves {left}")
            (disk / "filler").unlink()
            problems += [p for p in [tk("export", model, *flags).wrong(allowed=(0,))] if p]
    checks.tell("an export to a full disk, and then to one with room", problems)


# ---- broken models -----------------------------------------------------------------------------------------------------


def broken_models(checks, work, draw, models, count):
    records = write_records(work / "few.jsonl", [{"text": text} for text in TEXTS[:6]])
    labelled = write_records(work / "labelled.jsonl", [{"text": text, "label": 0} for text in TEXTS[:6]])
    prompts = write_records(work / "few-prompts.jsonl", [{"prompt": text} for text in TEXTS[:3]])
    external = exported(Path(shutil.copytree(ROOT / "models/tiny-distilbert-single", work / "external")), "--external-data")
    cases = [
        (models["classifier"], "onnx/model.onnx", records, []),
        (models["classifier"], "onnx/model_quantized.onnx", records, ["--precision", "int8"]),
        (external, "onnx/model.onnx", records, []),
        (external, "onnx/model.onnx_data", records, []),
        (models["generator"], "onnx/generate.onnx", prompts, ["--max-new-tokens", "3"]),
        (models["generator"], "onnx/model.onnx_data", prompts, ["--max-new-tokens", "3"]),
        (models["classifier"], "tokenizer.json", records, []),
        (models["classifier"], "config.json", records, []),
        (models["classifier"], "tokenizer_config.json", records, []),
        (models["classifier"], "model.safetensors", records, []),
        (models["generator"], "config.json", prompts, ["--max-new-tokens", "3"]),
        (models["generator"], "generation_config.json", prompts, ["--max-new-tokens", "3"]),
        (models["classifier"], "onnx/manifest.json", records, []),
    ]
    for model, name, source, flags in cases:
        right = tk("serve-batch", model, "--input", source, "--quiet", *flags)
        if right.wrong(allowed=(0,)):
            checks.tell(f"broken {model.name}/{name}", [f"whole: {right.said()}"])
            continue
        whole = (model / name).read_bytes()
        graph = name.endswith(".onnx")
        # labels, and what a model says of itself, are their owner's to change
        free = name in ("config.json", "tokenizer_config.json", "generation_config.json")
        problems, answered, refused = [], 0, 0
        broken = work / "broken"
        for i in range(count):
            if graph and i % 3:
                bytes_, change = mutants.nonsense(draw, whole)
            else:
                bytes_, change = mutants.broken(draw, whole)
            if bytes_ == whole:
                continue
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(model, broken, copy_function=os.link)
            (broken / name).unlink()
            (broken / name).write_bytes(bytes_)

            def check(what, done, allowed=(0, 1, 2)):
                wrong = done.wrong(allowed)
                if wrong:
                    kept = Path(tempfile.gettempdir()) / f"broken-{os.getpid()}-{len(problems)}-{Path(name).name}"
                    kept.write_bytes(bytes_)
                    problems.append(f"{what} of {change}: {wrong} (kept as {kept})")
                return done

            done = check("serve-batch", tk("serve-batch", broken, "--input", source, "--quiet", *flags))
            answered, refused = answered + (done.code == 0), refused + (done.code != 0)
            if done.code == 0 and not free and done.out != right.out:
                check("serve-batch, which gives other answers,", Finished(99, b"", done.err, 0, False))
            if i % 8 == 0 and not flags:
                check("eval", tk("eval", broken, "--input", labelled, "--quiet", "--runtime", "onnx"))
            if i % 8 == 4:
                check("serve", started_server(broken, flags if "--precision" in flags else []))
            if graph:
                # nobody says what the graph should be
                (broken / "onnx/manifest.json").unlink()
                check("serve-batch without a manifest", tk("serve-batch", broken, "--input", source, "--quiet", *flags))
                if "generate" not in name:
                    done = check("parity --onnx", tk("parity", "--onnx", broken / name, "--against", model, "--quiet",
                                                     "--input", records))
        shutil.rmtree(broken, ignore_errors=True)
        checks.tell(f"broken {model.name}/{name}", problems, f"{refused} of {answered + refused} refused")


def started_server(model, flags):
    """Starts a server, and ends it as soon as it listens."""
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    process = subprocess.Popen([TK, "serve", str(model), "--listen", "127.0.0.1:0", "--json", "--threads", "1", *flags],
                               stdout=out, stderr=err, preexec_fn=limits())
    ends = time.monotonic() + WALL_SECONDS
    while process.poll() is None and os.fstat(out.fileno()).st_size == 0 and time.monotonic() < ends:
        time.sleep(0.005)
    timed_out = process.poll() is None and time.monotonic() >= ends
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(WALL_SECONDS)
    except subprocess.TimeoutExpired:
        timed_out = True
        process.kill()
        process.wait()
    err.seek(0)
    return Finished(process.returncode, b"", err.read().decode(errors="replace"), 0, timed_out)


# ---- a server and its clients ------------------------------------------------------------------------------------------


def served(checks, work, models, seconds):
    texts = [text for text in TEXTS if text]
    records = write_records(work / "served.jsonl", [{"text": text} for text in texts])
    done = tk("serve-batch", models["classifier"], "--input", records, "--quiet")
    expected = dict(zip(texts, map(json.loads, done.out.decode().splitlines())))
    command = [TK, "serve", f"classify={models['classifier']}", f"write={models['generator']}", "--listen", "127.0.0.1:0",
               "--json", "--quiet", "--max-queue", "4096", "--max-body", "200000"]
    problems, about = rude_clients.soak(command, expected, seconds)
    checks.tell(f"a server of {seconds:.0f} s under all kinds of clients", problems, about)
    problems, about = rude_clients.ended_under_load(command, texts)
    checks.tell("a server that is asked to end with requests under way", problems, about)


def main():
    options = argparse.ArgumentParser(prog="check-reliability", description=__doc__)
    options.add_argument("--dir", type=Path, help="a trained and exported text classifier to check with [models/tiny-bert-single]")
    options.add_argument("--only", default="killed,disks,models,server", help="parts, by commas [%(default)s]")
    options.add_argument("--mutants", type=int, default=100, help="broken files of each kind [%(default)s]")
    options.add_argument("--seconds", type=float, default=30, help="how long clients are rude [%(default)s]")
    options.add_argument("--seed", type=int, default=42)
    options = options.parse_args()
    checks, draw = Checks(), random.Random(options.seed)
    parts = options.only.split(",")
    with tempfile.TemporaryDirectory(prefix="tk-reliability-") as work:
        work = Path(work).resolve()
        if options.dir:
            classifier = Path(shutil.copytree(options.dir, work / "classifier", ignore=shutil.ignore_patterns("training")))
        else:
            classifier = copied("tiny-bert-single", work)
        if not (classifier / "onnx/model_quantized.onnx").exists():
            exported(classifier, "--precision", "int8", "--max-metric-drop", "100")
        models = {"classifier": classifier, "embedder": copied("tiny-bert-embedding", work),
                  "generator": copied("tiny-gpt2-lm", work)}
        if "killed" in parts:
            killed(checks, work, draw, models, 200 if options.dir else 3000)
        if "disks" in parts:
            disks(checks, work, models)
        if "models" in parts:
            broken_models(checks, work, draw, models, options.mutants)
        if "server" in parts:
            served(checks, work, models, options.seconds)
    sys.exit(1 if checks.failed else 0)


if __name__ == "__main__":
    main()
