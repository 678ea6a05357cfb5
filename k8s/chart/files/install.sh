#!/bin/sh
# Installs the packages in $PACKAGES (one a line) into $TARGET, without their dependencies: the image has torch,
# numpy and the rest, and must keep its own. Wheels come from the folder $WHEELS if there is one, else from the
# package index.
set -eu
if [ -e "$TARGET/.installed" ]; then exit 0; fi
set -- --no-deps --target "$TARGET"
if [ -d "${WHEELS:-}" ]; then
  set -- "$@" --no-index --find-links "$WHEELS"
elif [ -n "${INDEX_URL:-}" ]; then
  set -- "$@" --index-url "$INDEX_URL"
fi
while IFS= read -r package; do
  if [ -n "$package" ]; then set -- "$@" "$package"; fi
done <<EOF
$PACKAGES
EOF
if python3 -m pip --version >/dev/null 2>&1; then
  python3 -m pip install --no-cache-dir "$@"
else
  uv pip install --no-cache --python "$(command -v python3)" "$@"
fi
touch "$TARGET/.installed"
