"""Two programs beside each other, slice by slice: is the one after a change as fast as the one before?

    python3 benches/pair.py --before OLD/target/release/measure --after target/release/measure \\
        --rounds 8 -- --ids-file IDS.json --weights f32 --policy full --max-new 1

Both run with the same arguments. Only one of them runs at any moment, a quarter of a second in turn, so that
whatever else the machine does meets both alike. Printed are each one's seconds while it was running (loading included), the
largest resident memory, and the median of the ratios. Linux only; needs no package.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time


class Process:
    """A program that stands still unless it is its turn."""

    def __init__(self, command):
        self.seconds, self.status, self.bytes = 0.0, None, 0
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        os.kill(self.child.pid, signal.SIGSTOP)

    def turn(self, seconds):
        start = time.perf_counter()
        os.kill(self.child.pid, signal.SIGCONT)
        while self.status is None and time.perf_counter() < start + seconds:
            pid, status, usage = os.wait4(self.child.pid, os.WNOHANG)
            if pid:
                self.status, self.bytes = status, usage.ru_maxrss * 1024
            else:
                time.sleep(0.002)
        if self.status is None:
            os.kill(self.child.pid, signal.SIGSTOP)
        self.seconds += time.perf_counter() - start


def together(commands, seconds):
    processes = [Process(command) for command in commands]
    try:
        while any(process.status is None for process in processes):
            for process in processes:
                if process.status is None:
                    process.turn(seconds)
    finally:
        for process in processes:
            if process.status is None:
                process.child.kill()
    for command, process in zip(commands, processes):
        if process.status != 0:
            sys.exit(f"{command[0]} ended with status {process.status}")
    return processes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--slice", type=float, default=0.25, help="seconds")
    parser.add_argument("arguments", nargs="*", help="what both are called with, after --")
    args = parser.parse_args()
    ratios = []
    for round in range(args.rounds):
        commands = [[program, *args.arguments] for program in (args.before, args.after)]
        # Who begins is loaded from a colder disk.
        turned = round % 2 == 1
        before, after = together(commands[::-1] if turned else commands, args.slice)[:: -1 if turned else 1]
        ratios.append(after.seconds / before.seconds)
        print(
            f"before {before.seconds:.2f} s, {before.bytes / 2**20:.1f} MiB; "
            f"after {after.seconds:.2f} s, {after.bytes / 2**20:.1f} MiB; time {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"after / before, median of {args.rounds}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
