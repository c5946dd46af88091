#!/usr/bin/env python3
"""`balancer.py` with sessions in an S3-compatible store: moto's server, on this machine.

    pip install openai boto3 'moto[server]'; apt-get install haproxy
    cargo build --release -p locret-serve --features s3
    python3 objects.py --serve ../../../target/release/serve [--conversations 100]
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import boto3

from common import free_port

BUCKET = "talks"


def main():
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    os.environ.update(
        AWS_ACCESS_KEY_ID="testing",
        AWS_SECRET_ACCESS_KEY="testing",
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ENDPOINT=endpoint,
        AWS_ALLOW_HTTP="true",
    )
    store = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        client = boto3.client("s3", endpoint_url=endpoint)
        for attempt in range(100):
            try:
                client.create_bucket(Bucket=BUCKET)
                break
            except Exception:
                if attempt == 99:
                    raise
                time.sleep(0.2)
        script = Path(__file__).with_name("balancer.py")
        place = f"s3://{BUCKET}/sessions"
        done = subprocess.run([sys.executable, script, "--sessions", place, *sys.argv[1:]])
        objects = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        found = [o for page in objects for o in page.get("Contents", [])]
        size = sum(o["Size"] for o in found)
        print(f"{len(found)} objects of {size / (1 << 20):.0f} MiB in the store")
        if not found:
            print("WRONG: nothing was stored")
            return 1
        return done.returncode
    finally:
        store.terminate()
        store.wait()


if __name__ == "__main__":
    sys.exit(main())
