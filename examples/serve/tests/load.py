#!/usr/bin/env python3
"""Many readers at once under a memory cap: none lost, none wrong, and never more memory than promised.

    pip install openai
    python3 load.py [--requests 200] [--clients 32] [--cap-mib 256]

Requests of 1,000 to 20,000 tokens come from 32 clients; then each is asked once more alone, and has to
give the same text (greedy, so the same tokens). The process must never take more than the cap, what it
took before the first request (the weights), and 64 MiB.
"""

import argparse
import random
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai

from common import MemoryWatch, Server, binary, mib, text

SPARE = 64 << 20


def request(index, low, high, answer):
    dice = random.Random(1000 + index)
    # Half of them below 1,800 tokens, one in twenty above 10,000.
    words = int(1 / (1 / low - dice.random() * (1 / low - 1 / high)))
    question = f"Number {index}: which of these words would you keep?"
    return {
        "words": words,
        "messages": [
            {"role": "system", "content": "You answer in a few words."},
            {"role": "user", "content": text(words, index) + "\n\n" + question},
        ],
        "stream": index % 2 == 0,
        "max_tokens": 8 + index % answer,
    }


def ask(client, asked):
    """Text, tokens of the prompt, tokens of the answer."""
    common = {
        "model": client.model_name,
        "messages": asked["messages"],
        "max_tokens": asked["max_tokens"],
        "temperature": 0,
    }
    if not asked["stream"]:
        answer = client.chat.completions.create(**common)
        return answer.choices[0].message.content, answer.usage
    parts, usage = [], None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(stream=True, stream_options=options, **common):
        if chunk.usage:
            usage = chunk.usage
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
    return "".join(parts), usage


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--serve", help="the server's program")
    options.add_argument("--requests", type=int, default=200)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--cap-mib", type=int, default=256)
    options.add_argument("--from-tokens", type=int, default=1000)
    options.add_argument("--to-tokens", type=int, default=20000)
    options.add_argument("--answer", type=int, default=24, help="8 tokens, and up to this many more")
    options.add_argument("--alone", type=int, help="ask only so many once more alone")
    options.add_argument("--log", default="/dev/null")
    options.add_argument(
        "flags", nargs="*", help="more flags of the server, after --"
    )
    given = options.parse_args()
    flags = given.flags or ["--policy", "window", "--budget", "512", "--chunk", "256"]
    cap = given.cap_mib << 20
    server = Server(
        binary(given.serve),
        "--memory-cap", f"{given.cap_mib}MiB", "--queue", given.clients, "--timeout", 86400,
        *flags,
        log=given.log,
    )
    client = openai.OpenAI(
        base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=86400
    )
    client.model_name = client.models.list().data[0].id
    weights = server.memory()
    # Set aside for system messages.
    resting = server.metric("locret_memory_promised_bytes")
    # A text has a few tokens more than words.
    scale = 1.25
    low, high = given.from_tokens / scale, given.to_tokens / scale
    asked = [request(i, low, high, given.answer) for i in range(given.requests)]
    watch, promised = MemoryWatch(server), []
    wrong, answers, times = [], {}, {}
    over = threading.Event()

    def sample():
        while not over.wait(0.2):
            promised.append(server.metric("locret_memory_promised_bytes"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()

    def one(i):
        started = time.time()
        try:
            answers[i] = ask(client, asked[i])
        except Exception as error:
            wrong.append(f"request {i} was lost: {error}")
        times[i] = time.time() - started

    started = time.time()
    with ThreadPoolExecutor(given.clients) as pool:
        list(pool.map(one, range(given.requests)))
    took = time.time() - started
    over.set()
    sampler.join()
    most = watch.stop()

    prompts = [usage.prompt_tokens for _, usage in answers.values()]
    generated = sum(usage.completion_tokens for _, usage in answers.values())
    if prompts:
        print(
            f"{len(answers)} of {given.requests} answered in {took:.0f} s: prompts of {min(prompts)} to "
            f"{max(prompts)} tokens, {sum(prompts)} in all ({sum(prompts) / took:.0f} a second), "
            f"{generated} generated; a request took {statistics.median(times.values()):.1f} s in the middle"
        )
    bound = cap + weights + SPARE
    print(
        f"memory: weights {mib(weights)} (the process before the first request), cap {mib(cap)}, "
        f"promised {mib(max(promised, default=0))} at most; the process took {mib(most)} at most, "
        f"allowed are {mib(bound)}"
    )
    if most > bound:
        wrong.append(f"the process took {mib(most)}, and {mib(bound)} are allowed")
    if max(promised, default=0) > cap:
        wrong.append(f"{mib(max(promised))} were promised, and {mib(cap)} are the cap")
    again = list(answers)[: given.alone] if given.alone is not None else list(answers)
    differing = 0
    for i in again:
        alone = ask(client, asked[i])
        if (alone[0], alone[1].completion_tokens) != (answers[i][0], answers[i][1].completion_tokens):
            differing += 1
            wrong.append(f"request {i}: alone {alone[0]!r}, among others {answers[i][0]!r}")
    print(f"{len(again)} asked once more alone: {differing} differ")
    if server.metric("locret_memory_promised_bytes") != resting:
        wrong.append("memory is still promised when nobody is there")
    if not server.end():
        wrong.append("the server did not end as it should")
    for line in wrong:
        print(line, file=sys.stderr)
    print("ok" if not wrong else "WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
