#!/usr/bin/env python3
"""Two servers behind HAProxy, conversations of three turns, and one of the servers killed half-way.

    pip install openai; apt-get install haproxy
    python3 balancer.py [--conversations 100] [--sessions s3://bucket/prefix]

Clients ask again what was not answered, as any client has to. Every conversation has to come to its end
with the texts of an undisturbed run on one server.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from common import Server, binary, free_port, text

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
TURNS = 3


class Balancer:
    """HAProxy with the configuration of `deploy`, at other ports."""

    def __init__(self, folder, servers):
        self.port = free_port()
        config = (DEPLOY / "haproxy.cfg").read_text()
        config = config.replace("*:8080", f"127.0.0.1:{self.port}")
        for i, server in enumerate(servers, 1):
            config = config.replace(f"serve-{i}:8080", f"127.0.0.1:{server.port}")
        # Names are those of containers.
        config = "\n".join(
            line.replace(" resolvers docker init-addr libc,none", "") for line in config.splitlines()
        )
        path = Path(folder) / "haproxy.cfg"
        path.write_text(config + "\n")
        subprocess.run(["haproxy", "-c", "-q", "-f", path], check=True)
        self.process = subprocess.Popen(["haproxy", "-f", path], stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{self.port}"
        time.sleep(1)

    def end(self):
        self.process.terminate()
        self.process.wait()


class Clients:
    def __init__(self, url, retries):
        self.client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600)
        self.model = "smollm2"
        self.retries = retries
        self.done, self.again, self.resumed = 0, 0, 0
        self.lock = threading.Lock()

    def turn(self, i, messages, before):
        """The answer, and the tokens of its prompt; `before` of them were those of the turn before."""
        for attempt in range(self.retries + 1):
            try:
                answer = self.client.chat.completions.create(
                    model=self.model, messages=messages, max_tokens=16, temperature=0,
                    extra_body={"session": f"talk-{i}"},
                )
                with self.lock:
                    self.done += 1
                    # More than the system message, which all conversations share.
                    cached = answer.usage.prompt_tokens_details.cached_tokens
                    self.resumed += 0 < before <= cached
                return answer.choices[0].message.content, answer.usage.prompt_tokens
            except (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError):
                if attempt == self.retries:
                    raise
                with self.lock:
                    self.again += 1
                time.sleep(0.3)

    def conversation(self, i):
        messages = [{"role": "system", "content": "You remember words."}]
        answers, before = [], 0
        for turn in range(TURNS):
            said = text(150 + 40 * (i % 5), 10 * i) if turn == 0 else f"And word {turn}?"
            messages.append({"role": "user", "content": said})
            answer, before = self.turn(i, messages, before)
            answers.append(answer)
            messages.append({"role": "assistant", "content": answers[-1]})
        return answers

    def all(self, n, clients):
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(self.conversation, range(n)))


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--serve", help="the server's program")
    options.add_argument("--conversations", type=int, default=100)
    options.add_argument("--clients", type=int, default=12)
    options.add_argument("--sessions", help="a place that both share, instead of a folder")
    options.add_argument("--log", default="/dev/null")
    given = options.parse_args()
    program = binary(given.serve)
    if not shutil.which("haproxy"):
        raise SystemExit("haproxy is not installed")
    flags = ["--policy", "window", "--budget", "128", "--chunk", "64", "--memory-cap", "128MiB"]
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        one = Server(program, *flags, "--sessions", f"{folder}/alone", log=given.log)
        started = time.time()
        expected = Clients(one.url, retries=0).all(given.conversations, given.clients)
        print(f"one server, undisturbed: {time.time() - started:.0f} s")
        one.end()

        place = given.sessions or f"{folder}/shared"
        servers = [Server(program, *flags, "--sessions", place, log=given.log) for _ in range(2)]
        balancer = Balancer(folder, servers)
        clients = Clients(balancer.url, retries=50)
        found = {}

        def run():
            try:
                found["answers"] = clients.all(given.conversations, given.clients)
            except Exception as error:
                wrong.append(f"a conversation was lost: {error}")

        started = time.time()
        thread = threading.Thread(target=run)
        thread.start()
        half = given.conversations * TURNS // 2
        while clients.done < half and thread.is_alive():
            time.sleep(0.01)
        # With answers under way.
        while servers[0].metric("locret_sequences_running") == 0 and thread.is_alive():
            time.sleep(0.01)
        took_part = [s.metric('locret_sessions_stored_total') for s in servers]
        servers[0].kill()
        print(f"killed one server after {clients.done} of {given.conversations * TURNS} turns")
        thread.join()
        print(
            f"two servers, one of them killed: {time.time() - started:.0f} s, {clients.done} turns answered, "
            f"{clients.resumed} of them from a stored session, {clients.again} asked once more; "
            f"before the end of the first the two had stored {took_part[0]:.0f} and {took_part[1]:.0f}"
        )
        answers = found.get("answers", [])
        differing = [i for i, (a, b) in enumerate(zip(expected, answers)) if a != b]
        for i in differing:
            wrong.append(f"conversation {i}: {answers[i]!r} instead of {expected[i]!r}")
        if len(answers) != given.conversations:
            wrong.append(f"{len(answers)} of {given.conversations} conversations came to their end")
        if clients.resumed != given.conversations * (TURNS - 1):
            wrong.append(f"{clients.resumed} turns went on from a session")
        if min(took_part) == 0:
            wrong.append("only one of the servers was asked")
        balancer.end()
        if not servers[1].end():
            wrong.append("the other server did not end as it should")
    for line in wrong:
        print(line, file=sys.stderr)
    print("ok" if not wrong else "WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
