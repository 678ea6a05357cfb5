#!/bin/sh
# Before the worker starts: waits for the artifact, pins it for this pod's life, and checks the configuration.
# The pod keeps the artifact that it began with, whatever the alias says later.
set -eu
link=${LINK:-/run/dynamo-kvtc/artifact}
if [ -n "${STORE:-}" ] && [ ! -e "$link/artifact.json" ]; then
  waited=0
  while :; do
    id=${ARTIFACT_ID:-}
    if [ -z "$id" ] && [ -r "$STORE/aliases/$ARTIFACT_ALIAS" ]; then
      id=$(cat "$STORE/aliases/$ARTIFACT_ALIAS")
    fi
    if [ -n "$id" ] && [ -r "$STORE/$id/artifact.json" ]; then break; fi
    if [ "$waited" -ge "$WAIT_SECONDS" ]; then
      echo "no artifact ${ARTIFACT_ID:-$ARTIFACT_ALIAS} in the store after $waited s: look at the calibration Job," \
        "or put the artifact there with dynamo-kvtc publish" >&2
      exit 1
    fi
    echo "waiting for the artifact ${ARTIFACT_ID:-$ARTIFACT_ALIAS}"
    sleep 5
    waited=$((waited + 5))
  done
  ln -sfn "$STORE/$id" "$link"
  echo "artifact $id"
fi
exec python3 -m dynamo_kvtc validate-config "${CONFIG:-/etc/dynamo-kvtc/kvtc.yaml}"
