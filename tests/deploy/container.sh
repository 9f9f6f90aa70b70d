#!/usr/bin/env bash
# Build the image and check it as it is deployed: read-only, not root, the pictures in a volume.
# Needs podman or docker, and curl; says so and exits 2 without. Takes PORT (3490) of this machine.
set -euo pipefail
cd "$(dirname "$0")/../.."

port=${PORT:-3490} url=http://127.0.0.1:${PORT:-3490} image=lookalike-check name=lookalike-check-$$
fail() { echo "container: $*" >&2; exit 1; }
cannot() { echo "container: not checked: $*" >&2; exit 2; }

tool=
for candidate in podman docker; do
  if "$candidate" info >/dev/null 2>&1; then tool=$candidate; break; fi
done
[[ $tool ]] || cannot "neither podman nor docker works here"
command -v curl >/dev/null || cannot "curl is not here"
[[ -f models/digits/model.onnx ]] || cannot "models/digits is not here"
if curl -s -o /dev/null "$url"; then cannot "port $port is taken; name another with PORT="; fi

work=$(mktemp -d)
mkdir "$work/pictures"
clean_up() {
  "$tool" rm -f "$name" >/dev/null 2>&1 || true
  "$tool" volume rm "$name" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap clean_up EXIT

start() { # serve from the volume, and wait until it is ready
  local begin=$SECONDS
  "$tool" run -d --name "$name" --read-only --tmpfs /tmp -v "$name:/data" \
    -p "127.0.0.1:$port:$port" -e "LOOKALIKE_PORT=$port" "$image" >/dev/null
  until curl -sf -o /dev/null "$url/readyz"; do
    ((SECONDS - begin < 60)) || { "$tool" logs "$name" >&2; fail "not ready after 60 s"; }
    sleep 0.2
  done
  echo "ready after $((SECONDS - begin)) s"
}

stop() { # ask it to end, and see that it ends well
  local begin=$SECONDS code
  "$tool" stop -t 20 "$name" >/dev/null
  code=$("$tool" inspect -f '{{.State.ExitCode}}' "$name")
  [[ $code == 0 ]] || { "$tool" logs "$name" >&2; fail "exit code $code after stop, expected 0"; }
  "$tool" rm "$name" >/dev/null
  echo "stopped after $((SECONDS - begin)) s, exit code 0"
}

expect() { # WHAT WANTED TEXT
  [[ $3 == *"$2"* ]] || fail "$1: expected $2, got $3"
  echo "$1: $2"
}

find_x() { # the picture that was sent is the first hit
  expect search '{"hits":[{"id":"x"' "$(curl -fsS --data-binary @"$work/pictures/x.png" -H 'content-type: image/png' "$url/search?k=1")"
}

format=()
[[ $tool == docker ]] || format=(--format docker) # the form that holds a HEALTHCHECK
"$tool" build "${format[@]}" -t "$image" . >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; fail "no image"; }
echo "image: $("$tool" images --format '{{.Size}}' "$image")"
"$tool" run --rm --entrypoint python "$image" -c 'import sys
from PIL import Image
Image.linear_gradient("L").resize((64, 64)).save(sys.stdout.buffer, "png")' >"$work/pictures/x.png"
chmod -R a+rX "$work/pictures"

start
expect encoder '"model":"photos"' "$(curl -fsS "$url/info")"
expect user uid=10001 "$("$tool" exec "$name" id)"
if "$tool" exec --user 0 "$name" touch /app/x 2>/dev/null; then fail "its root file system can be written"; fi
expect add '"id":"x"' "$(curl -fsS -X PUT --data-binary @"$work/pictures/x.png" -H 'content-type: image/png' "$url/images/x")"
find_x
if [[ $tool == podman ]]; then
  podman healthcheck run "$name" >/dev/null || fail "health: podman healthcheck run failed"
  echo "health: healthy"
else
  for _ in {1..30}; do
    health=$(docker inspect -f '{{.State.Health.Status}}' "$name")
    [[ $health == healthy ]] && break
    sleep 1
  done
  expect health healthy "$health"
fi
stop

# The volume outlives the container; a folder is indexed while nobody serves it.
"$tool" run --rm --read-only --tmpfs /tmp -v "$name:/data" -v "$work/pictures:/pictures:ro,z" "$image" \
  index /pictures --store /data/store
start
find_x
expect count '"count":2' "$(curl -fsS "$url/info")"
stop
echo "container: all well ($tool)"
