#!/usr/bin/env python3
"""Sequences that take turns through `--spill` on a disk that is full, then read-only, then neither.

    pip install openai
    python3 spill.py [--requests 6]

Linux, as root: disks are mounted in memory. Every answer has to be that of an undisturbed server, nothing may be
left on the disk, and the server has to say what is wrong. Then the server is killed while somebody is put away, and
one that begins after it neither minds what was left nor takes it for its own.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from common import Server, binary, text

TOKENS = 150


def all_answers(server, requests):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=900)

    def one(i):
        answer = client.chat.completions.create(
            model="smollm2", max_tokens=TOKENS, temperature=0,
            messages=[{"role": "user", "content": text(60 + 10 * i, i) + "\nTell a long story of these."}],
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(requests) as pool:
        return list(pool.map(one, range(requests)))


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--serve", help="the server's program")
    options.add_argument("--requests", type=int, default=6)
    given = options.parse_args()
    program = binary(given.serve)
    # A sequence takes up to 20 MiB: one or two of them fit.
    flags = ["--policy", "full", "--chunk", "64", "--timeout", "900"]
    cap = ["--memory-cap", "32MiB"]
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        disk, log = Path(folder, "disk"), Path(folder, "log")
        disk.mkdir()
        mount = lambda *how: subprocess.run(["mount", *how, disk], check=True)
        mount("-t", "tmpfs", "-o", "size=1m", "none")
        try:
            alone = Server(program, *flags)
            expected = all_answers(alone, given.requests)
            if not alone.end():
                wrong.append("the undisturbed server did not end as it should")
            server = Server(program, *flags, *cap, "--spill", disk, log=log)
            stayed, parked = 0, 0
            for state, how in [
                ("full", None), ("read-only", "remount,ro"), ("large enough", "remount,rw,size=512m"),
            ]:
                if how:
                    mount("-o", how)
                start = time.time()
                answers = all_answers(server, given.requests)
                now = [
                    int(server.metric(f"locret_sequences_{name}_total")) for name in ("not_parked", "parked")
                ]
                print(
                    f"{state}: {time.time() - start:.0f} s, {now[0] - stayed} times nobody could make way, "
                    f"{now[1] - parked} times somebody did"
                )
                could, did = state == "large enough", now[1] > parked
                if answers != expected:
                    wrong.append(f"{state}: other answers than those of an undisturbed server")
                if could != did or (not could and now[0] == stayed):
                    wrong.append(f"{state}: {now} after {[stayed, parked]}")
                stayed, parked = now
                if left := [file.name for file in disk.iterdir()]:
                    wrong.append(f"{state}: {left} are left")
            said = log.read_text()
            for reason in ["No space left on device", "Read-only file system"]:
                print(*[line for line in said.splitlines() if reason in line], sep="\n")
                if reason not in said:
                    wrong.append(f"nothing was said of: {reason}")

            crowd = threading.Thread(target=lambda: lost(server, given.requests))
            crowd.start()
            while not list(disk.glob("parked-*")):
                time.sleep(0.01)
            server.kill()
            crowd.join()
            left = sorted(file.name for file in disk.iterdir())
            after = Server(program, *flags, *cap, "--spill", disk)
            if all_answers(after, given.requests) != expected:
                wrong.append("after one that was killed: other answers")
            if not after.end():
                wrong.append("the last server did not end as it should")
            if sorted(file.name for file in disk.iterdir()) != left:
                wrong.append("after one that was killed: other files are left than it left")
            print(f"killed with {left} on the disk; the next server answered all")

            mount("-o", "remount,ro")
            begun = subprocess.run(
                [program, "--port", "0", *flags, "--spill", disk], capture_output=True, text=True, timeout=120
            )
            print(f"begun with a read-only disk: {begun.stderr.strip().splitlines()[-1]}")
            if begun.returncode == 0 or "cannot be written to" not in begun.stderr:
                wrong.append("a server begins that can put nobody away")
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    for line in wrong:
        print(line, file=sys.stderr)
    print("ok" if not wrong else "WRONG")
    return 1 if wrong else 0


def lost(server, requests):
    try:
        all_answers(server, requests)
    except openai.APIError:
        pass


if __name__ == "__main__":
    sys.exit(main())
