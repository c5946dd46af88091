#!/usr/bin/env python3
"""The page in headless Chromium: a long text is read, coloured by what survives, and answered.

    pip install playwright; apt-get install chromium (or: playwright install chromium)
    python3 page.py [--screenshots FOLDER]
"""

import argparse
import re
import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from common import Server, binary, text


def until(page, expression, seconds):
    """Waits for the page; not in the page, whose policy forbids scripts that others bring."""
    end = time.time() + seconds
    while not page.evaluate(expression):
        if time.time() > end:
            raise SystemExit(f"{expression} did not come true within {seconds} seconds")
        time.sleep(0.02)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--serve", help="the server's program")
    options.add_argument("--chromium", default=shutil.which("chromium"))
    options.add_argument("--screenshots", help="a folder for pictures")
    options.add_argument("--words", type=int, default=1500)
    options.add_argument("--log", default="/dev/null")
    given = options.parse_args()
    flags = ["--policy", "locret", "--budget", "256", "--chunk", "128", "--token", "key-7"]
    server = Server(binary(given.serve), *flags, log=given.log)
    wrong, requests, messages = [], [], []

    def check(what, holds):
        if not holds:
            wrong.append(what)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=given.chromium, args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 1400})
        page.on("request", lambda r: requests.append(r.url))
        page.on("pageerror", lambda e: messages.append(str(e)))
        page.goto(server.url)
        said = text(given.words, 3) + " The secret number is 4711. " + text(100, 4)
        page.fill("#context", said)
        page.fill("#question", "What is the secret number?")
        page.fill("#most", "24")

        # Without the key: an error in plain words.
        page.click("#go")
        page.wait_for_selector("#error:not(:empty)")
        check("an error without the key", "key" in page.inner_text("#error"))

        page.fill("#key", "key-7")
        page.click("#go")
        until(page, "document.querySelectorAll('#read span.now').length > 600", 120)
        middle = page.evaluate(
            """() => ({
                state: document.body.dataset.state,
                spans: document.querySelectorAll('#read span').length,
                read: document.querySelectorAll('#read span.now').length,
                colours: new Set([...document.querySelectorAll('#read span.now')]
                    .map(s => s.style.backgroundColor)).size,
                memory: document.querySelector('#memory').textContent,
            })"""
        )
        print(f"while it is read: {middle}")
        check("it is still being read", middle["state"] == "reading")
        check("some has been read, not all", 0 < middle["read"] < middle["spans"])
        check("tokens survive in different shares", middle["colours"] > 5)
        if given.screenshots:
            page.screenshot(path=str(Path(given.screenshots) / "reading.png"))
        until(page, "document.body.dataset.state === 'done'", 300)
        end = page.evaluate(
            """() => ({
                spans: document.querySelectorAll('#read span').length,
                read: document.querySelectorAll('#read span.now').length,
                gone: [...document.querySelectorAll('#read span')].filter(s => s.style.opacity === '0.45').length,
                text: document.querySelector('#read').textContent,
                answer: document.querySelector('#answer').textContent,
                points: document.querySelector('#ownline').getAttribute('points').split(' ').length,
                memory: document.querySelector('#memory').textContent,
                error: document.querySelector('#error').textContent,
            })"""
        )
        print(f"in the end: {end['memory']} Answer: {end['answer']!r}")
        check("all has been read", end["read"] == end["spans"])
        check("some tokens are gone everywhere", end["gone"] > 0)
        check("the text is there as it is", said in end["text"])
        check("there is an answer", end["answer"].strip() != "")
        check("memory was drawn", end["points"] > 8)
        times = re.search(r"\(([\d.]+) times", end["memory"])
        check("memory is smaller than a full cache's", times and float(times.group(1)) > 3)
        check(f"no error: {end['error']}", end["error"] == "")
        if given.screenshots:
            page.screenshot(path=str(Path(given.screenshots) / "read.png"))

        # Stopped: the sequence is gone.
        page.click("#go")
        until(page, "document.querySelectorAll('#read span.now').length > 100", 120)
        page.click("#stop")
        until(page, "document.body.dataset.state === 'ended'", 60)
        browser.close()
    check(f"nothing from elsewhere: {requests}", all(r.startswith(server.url) for r in requests))
    check(f"no errors of the script: {messages}", not messages)
    if not server.end():
        wrong.append("the server did not end as it should")
    for line in wrong:
        print(f"not so: {line}", file=sys.stderr)
    print("ok" if not wrong else "WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
