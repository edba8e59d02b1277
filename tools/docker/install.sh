#!/usr/bin/env bash
# What the Dockerfile does, in a fresh virtual environment: install, start as it starts, ask, stop.
#   bash tools/docker/install.sh [12|13|cpu]
set -euo pipefail
cd "$(dirname "$0")/../.."
major="${1:-13}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
extras="serve"
device=(--device cpu)
if [ "$major" != cpu ]; then
  extras="cuda$major,serve"
  device=()
fi
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir ".[$extras]"
cd "$folder"
export GPT2CUPY_CACHE_DIR="$folder/kernels"
venv/bin/gpt2cupy serve --host 127.0.0.1 --port 0 --model shakespeare "${device[@]}" 2> log &
server=$!
trap 'kill "$server" 2> /dev/null || true; rm -rf "$folder"' EXIT
for _ in $(seq 600); do
  url="$(sed -n 's/.* is ready on \(http[^ ]*\) .*/\1/p' log)"
  [ -n "$url" ] && break
  kill -0 "$server" || { cat log; exit 1; }
  sleep 0.2
done
venv/bin/python - "$url" <<'PYTHON'
import json, sys, urllib.request

def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(sys.argv[1] + path, data, timeout=60).read()

assert json.loads(ask("/ready"))["ready"]
text = json.loads(ask("/v1/completions", {"prompt": "ROMEO:", "max_tokens": 8}))["choices"][0]
assert text["finish_reason"] == "length", text
assert b"vllm:generation_tokens_total" in ask("/metrics")
PYTHON
kill -TERM "$server"
wait "$server"
echo "installed, served and stopped"
