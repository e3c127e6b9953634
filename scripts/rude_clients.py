"""A command that starts a server comes in; what it answered to good, bad, oversize, vanishing and slow clients goes out.

A request that was sent whole gets exactly one answer: the right one, or a clean refusal. Everything here is written on
sockets, so that clients can do what no library lets them do."""

import asyncio
import json
import random
import signal
import statistics
import subprocess
import time

# how long a client waits for its answer
PATIENCE = 60


class Server:
    def __init__(self, command):
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the server does not start: {self.process.stderr.read().decode()}")
        host, port = json.loads(line)["address"].rsplit(":", 1)
        self.address = (host, int(port))

    def resident(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

    def stop(self):
        """Asks it to end; its exit code, and what it has said."""
        self.process.send_signal(signal.SIGTERM)
        try:
            _, said = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, said = self.process.communicate()
            return "never ends", said.decode(errors="replace")
        return self.process.returncode, said.decode(errors="replace")


def request(path, body, headers=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: tk\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


async def answer(reader):
    """The status and the body of one answer; none where the connection is closed."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = await reader.readline()
        if not line:
            return None
        head += line
    lines = head.decode().split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:] if ":" in line)}
    if "content-length" in fields:
        body = await reader.readexactly(int(fields["content-length"]))
    else:
        body = b""
        size = None
        while size != 0:
            size = int(await reader.readline(), 16)
            body += await reader.readexactly(size)
            await reader.readline()
    return int(lines[0].split()[1]), body


class Clients:
    def __init__(self, address, expected):
        self.address, self.expected = address, expected
        self.texts = list(expected)
        self.problems, self.counts = [], {}

    def count(self, what):
        self.counts[what] = self.counts.get(what, 0) + 1

    def problem(self, text):
        if len(self.problems) < 50:
            self.problems.append(text)

    async def ask(self, reader, writer, data, who, statuses):
        """Sends a request whole, and holds its answer against what is allowed."""
        try:
            writer.write(data)
            await writer.drain()
        except ConnectionError:
            return None  # not sent whole
        try:
            found = await asyncio.wait_for(answer(reader), PATIENCE)
        except (asyncio.TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
            return self.problem(f"{who}: no answer ({error!r})")
        if found is None:
            return self.problem(f"{who}: closed without an answer")
        if found[0] not in statuses:
            return self.problem(f"{who}: {found[0]}, expected one of {statuses}: {found[1][:200]}")
        self.count(f"{who} {found[0]}")
        return found

    async def good(self, draw):
        """Several requests on one connection."""
        reader, writer = await asyncio.open_connection(*self.address)
        for _ in range(draw.randint(1, 20)):
            texts = draw.choices(self.texts, k=draw.choice([1, 1, 1, 3, 20]))
            found = await self.ask(reader, writer, request("/models/classify/predict", {"inputs": [[t] for t in texts]}),
                                   "good", (200, 429, 503))
            if found is None:
                break
            if found[0] == 200:
                self.compare(texts, json.loads(found[1]))
        writer.close()

    def compare(self, texts, answers):
        if len(answers) != len(texts):
            return self.problem(f"good: {len(answers)} answers to {len(texts)} texts")
        for text, labels in zip(texts, answers):
            wanted = self.expected[text]["scores"]
            found = {label["label"]: label["score"] for label in labels}
            if found.keys() != wanted.keys() or any(abs(found[name] - wanted[name]) > 1e-4 for name in wanted):
                self.problem(f"good: {text!r} is answered {found}, expected {wanted}")

    async def writing(self, draw):
        reader, writer = await asyncio.open_connection(*self.address)
        body = {"model": "write", "prompt": draw.choice(self.texts), "max_tokens": draw.randint(1, 24),
                "stream": draw.random() < 0.5}
        found = await self.ask(reader, writer, request("/v1/completions", body), "writing", (200, 429, 503))
        if found and found[0] == 200 and body["stream"] and not found[1].rstrip().endswith(b"[DONE]"):
            self.problem(f"writing: a stream ends with {found[1][-80:]}")
        writer.close()

    async def bad(self, draw):
        reader, writer = await asyncio.open_connection(*self.address)
        path, body, statuses = draw.choice([
            ("/models/classify/predict", b"{", (400, 422)),
            ("/models/classify/predict", {"inputs": 7}, (400, 422)),
            ("/models/classify/predict", {"inputs": [["a"] * 9]}, (400, 422)),
            ("/models/classify/predict", b"\xff\xfe{}", (400, 422)),
            ("/models/absent/predict", {"inputs": "a"}, (404,)),
            ("/models/classify/embed", {"inputs": "a"}, (400, 404, 422, 424)),
            ("/no/such/path", {}, (404,)),
            ("/v1/completions", {"model": "write", "prompt": "a", "max_tokens": -1}, (400, 422)),
            ("/v1/completions", {"model": "write", "prompt": ["a"] * 3, "temperature": 1e99}, (400, 422)),
            ("/models/classify/predict", {"inputs": [[t] for t in self.texts * 99]}, (400, 413, 422)),
        ])
        await self.ask(reader, writer, request(path, body), "bad", statuses)
        writer.close()

    async def garbage(self, draw):
        """No HTTP at all: anything but a crash will do."""
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(draw.randbytes(draw.randint(1, 3000)) + b"\r\n\r\n")
        try:
            await writer.drain()
            await asyncio.wait_for(reader.read(100), 2)
        except (ConnectionError, asyncio.TimeoutError):
            pass
        self.count("garbage")
        writer.close()

    async def oversize(self, draw):
        reader, writer = await asyncio.open_connection(*self.address)
        data = request("/models/classify/predict", {"inputs": "x" * draw.choice([200_001, 1_000_000])})
        try:
            writer.write(data)
            await writer.drain()
            found = await asyncio.wait_for(answer(reader), PATIENCE)
        except (ConnectionError, asyncio.IncompleteReadError):
            found = (413, b"")  # refused while it was still being sent
        if found and found[0] != 413:
            self.problem(f"oversize: {found[0]}: {found[1][:200]}")
        self.count("oversize")
        writer.close()

    async def vanishing(self, draw):
        """Goes in the middle of its request, or without waiting for the answer."""
        _, writer = await asyncio.open_connection(*self.address)
        data = draw.choice([
            request("/models/classify/predict", {"inputs": [[t] for t in self.texts * 9]}),
            request("/v1/completions", {"model": "write", "prompt": "a", "max_tokens": 30, "stream": True}),
        ])
        writer.write(data[:draw.choice([len(data), draw.randrange(len(data))])])
        try:
            await writer.drain()
            await asyncio.sleep(draw.choice([0, 0, 0.01]))
        except ConnectionError:
            pass
        writer.transport.abort()
        self.count("vanishing")

    async def slow(self, draw):
        """Sends its request a few bytes at a time."""
        reader, writer = await asyncio.open_connection(*self.address)
        text = draw.choice(self.texts)
        data = request("/models/classify/predict", {"inputs": [[text]]})
        *parts, last = [data[at:at + 9] for at in range(0, len(data), 9)]
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.05)
        found = await self.ask(reader, writer, last, "slow", (200, 429, 503))
        if found and found[0] == 200:
            self.compare([text], json.loads(found[1]))
        writer.close()


async def crowd(clients, seconds, resident):
    kinds = [clients.good] * 6 + [clients.writing, clients.bad, clients.garbage, clients.oversize, clients.vanishing,
                                  clients.vanishing, clients.slow, clients.slow]
    ends, memory = time.monotonic() + seconds, []

    async def one(kind, seed):
        draw = random.Random(seed)
        while time.monotonic() < ends:
            try:
                await kind(draw)
            except ConnectionRefusedError as error:
                return clients.problem(f"{kind.__name__}: {error}")
            except ConnectionError:
                clients.count("connections reset before a request was sent")

    async def watch():
        while time.monotonic() < ends:
            memory.append(resident())
            await asyncio.sleep(seconds / 200)

    await asyncio.gather(watch(), *(one(kind, seed) for seed, kind in enumerate(kinds)))
    return memory


def soak(command, expected, seconds):
    server = Server(command)
    clients = Clients(server.address, expected)
    try:
        memory = asyncio.run(crowd(clients, seconds, server.resident))
    finally:
        code, said = server.stop()
    problems = clients.problems
    if code != 0:
        problems.append(f"SIGTERM ends it with {code}: {said[-300:]}")
    if "panicked" in said:
        problems.append(f"panics: {said[-300:]}")
    if not clients.counts.get("good 200"):
        problems.append("no good request was answered")
    quarter = len(memory) // 4
    before, after = statistics.median(memory[quarter:2 * quarter]), statistics.median(memory[-quarter:])
    if after > before * 1.05 + (16 << 20):
        problems.append(f"memory grows from {before / 1e6:.0f} to {after / 1e6:.0f} MB")
    counts = ", ".join(f"{n} {what}" for what, n in sorted(clients.counts.items()))
    return problems, f"{counts}; {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB"


def ended_under_load(command, texts):
    """Requests that the server has taken are answered before it ends."""
    server = Server([*command, "--threads", "1", "--max-batch-tokens", "8"])
    inputs = [[text] for text in texts] * (200 // len(texts))

    async def run():
        connections = [await asyncio.open_connection(*server.address) for _ in range(16)]
        for _, writer in connections:
            writer.write(request("/models/classify/predict", {"inputs": inputs}))
            await writer.drain()
        # all are in: their records wait or are computed, or are answered already
        while taken(await metrics(server.address)) < len(connections) * len(inputs) - 1:
            await asyncio.sleep(0.001)
        server.process.send_signal(signal.SIGTERM)
        found = []
        for reader, _ in connections:
            try:
                found.append(await asyncio.wait_for(answer(reader), PATIENCE))
            except (asyncio.TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
                found.append(error)
        return found

    found = asyncio.run(run())
    code, said = server.stop() if server.process.poll() is None else (server.process.wait(), "")
    problems = [f"a request under way is answered {one!r}" for one in found
                if not isinstance(one, tuple) or one[0] not in (200, 429, 503)]
    problems += [f"{len(json.loads(one[1]))} answers to {len(inputs)} texts" for one in found
                 if isinstance(one, tuple) and one[0] == 200 and len(json.loads(one[1])) != len(inputs)]
    if code != 0:
        problems.append(f"exit code {code}: {said[-300:]}")
    return problems, f"{sum(isinstance(one, tuple) and one[0] == 200 for one in found)} of {len(found)} answered"


async def metrics(address):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: tk\r\n\r\n")
    found = await answer(reader)
    writer.close()
    return found[1].decode() if found else ""


def taken(metrics):
    """Records that were answered, or wait for it."""
    counted = ("tk_records_total", "tk_waiting_records{")
    return sum(float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(counted))
