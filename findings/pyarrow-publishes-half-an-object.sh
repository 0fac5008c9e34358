#!/usr/bin/env bash
# pyarrow 26.0.1 on S3: a block `with filesystem.open_output_stream(path)` that ends in an exception still publishes what
# was written so far, as a whole object of its own; and `metadata={"If-None-Match": "*"}` is no condition, the object
# that is there is overwritten. On a local disk one would expect the first, for an object store not: objects appear
# whole or not at all, so a reader cannot tell half a part of Parquet's bytes from a whole one but by reading it.
# Seen (moto 5.2.5 as the server):
#     after the exception: b'first half'
#     after a conditional put: b'second'
# A writer that may fail has to make the bytes first and open the stream last.
set -euo pipefail
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 "moto[s3,server]==5.2.5"
cd "$WORK"
AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_EC2_METADATA_DISABLED=true \
    "$WORK/venv/bin/python" - 2>"$WORK/log" <<'PY' || { tail -20 "$WORK/log"; exit 1; }
import subprocess
import sys
import time
from pathlib import Path

from pyarrow.fs import S3FileSystem

server = subprocess.Popen(
    [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", "0"],
    stderr=subprocess.PIPE,
    text=True,
)
try:
    address = next(line.split("http://")[1].split()[0] for line in server.stderr if "http://127.0.0.1:" in line)
    store = S3FileSystem(endpoint_override=address, scheme="http", region="us-east-1", allow_bucket_creation=True)
    store.create_dir("bucket")
    try:
        with store.open_output_stream("bucket/part") as stream:
            stream.write(b"first half")
            raise RuntimeError("the writer fails")
    except RuntimeError:
        pass
    with store.open_input_stream("bucket/part") as stream:
        half = stream.read()
    print("after the exception:", half)
    for content in (b"first", b"second"):
        with store.open_output_stream("bucket/once", metadata={"If-None-Match": "*"}) as stream:
            stream.write(content)
    with store.open_input_stream("bucket/once") as stream:
        once = stream.read()
    print("after a conditional put:", once)
finally:
    server.terminate()
    server.wait()
sys.exit(0 if (half, once) == (b"first half", b"second") else "CHANGED")
PY
echo "as described: pyarrow 26.0.1 publishes what a failed block has written, and has no conditional put"
