#!/bin/sh
# Makes the artifact and publishes it in the store, under its id and under the alias that names these inputs.
# Running it again is cheap: a published artifact is verified and kept, an unfinished calibration goes on.
set -eu
alias_file=$STORE/aliases/$ARTIFACT_ALIAS
if [ -r "$alias_file" ] && python3 -m dynamo_kvtc inspect "$STORE/$(cat "$alias_file")"; then
  echo "the artifact of these inputs is in the store already"
  exit 0
fi
if [ ! -d "$MODEL" ]; then
  MODEL=$(python3 -c 'import sys; from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))' "$MODEL")
fi
if [ -z "$TEXTS" ]; then
  TEXTS=$(python3 -c 'from dynamo_kvtc.data import CALIBRATION_TEXTS; print(*CALIBRATION_TEXTS, sep="\n")')
fi
work=$SCRATCH/$ARTIFACT_ALIAS
while IFS= read -r text; do
  if [ -n "$text" ]; then set -- "$@" --text "$text"; fi
done <<EOF
$TEXTS
EOF
python3 -m dynamo_kvtc calibrate --model "$MODEL" --out "$work" "$@"
python3 -m dynamo_kvtc publish "$work" "$STORE" --alias "$ARTIFACT_ALIAS" --alias latest
