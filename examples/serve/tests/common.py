"""What the scripts beside this file share: servers as processes, texts, memory."""

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WORDS = (
    "river lamp seven cold stone garden window letter morning paper bridge silver north market "
    "engine harbour winter island teacher violin copper forest mirror candle valley thunder "
    "orange castle shadow feather saddle anchor"
).split()


def binary(given):
    """The server's program: as given, or as cargo built it for its tests."""
    path = Path(given) if given else ROOT / "target/release/serve"
    if not path.is_file():
        raise SystemExit(
            f"{path} is not there: build it (cargo test --release --workspace --test http --no-run), "
            "or name another with --serve"
        )
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def text(words, seed):
    """Sentences that say different things for different seeds."""
    dice = random.Random(seed)
    sentences = []
    while words > 0:
        length = min(words, dice.randint(6, 14))
        sentence = [dice.choice(WORDS) for _ in range(length)]
        sentences.append(" ".join(sentence).capitalize() + ".")
        words -= length
    return " ".join(sentences)


class Server:
    """A server as a process of its own."""

    def __init__(self, program, *flags, port=None, env=None, log=None):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [str(program), "--port", str(self.port), *map(str, flags)]
        self.log = open(log, "ab") if log else subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=self.log, env={**os.environ, **(env or {})}
        )
        self.wait()

    def wait(self, seconds=120):
        end = time.time() + seconds
        while time.time() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with {self.process.returncode}")
            try:
                if self.get("/health")["status"] == "ok":
                    return
            except OSError:
                time.sleep(0.05)
        raise SystemExit("the server did not begin to answer")

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            body = answer.read().decode()
        return body if path == "/metrics" else json.loads(body)

    def metric(self, name):
        for line in self.get("/metrics").splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise KeyError(name)

    def memory(self, field="VmRSS"):
        """Bytes of the process, as the system counts them."""
        with open(f"/proc/{self.process.pid}/status") as status:
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
        return 0

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        """As a service manager ends it; whether it was finished in time."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60) == 0


class MemoryWatch:
    """The most that a process has in memory, looked at every few milliseconds."""

    def __init__(self, server):
        self.server, self.most, self.over = server, 0, False
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self):
        while not self.over:
            try:
                self.most = max(self.most, self.server.memory())
            except (FileNotFoundError, ProcessLookupError):
                return
            time.sleep(0.005)

    def stop(self):
        self.over = True
        self.thread.join()
        return self.most


def mib(n):
    return f"{n / (1 << 20):.1f} MiB"
