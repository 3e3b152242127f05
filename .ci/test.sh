#!/usr/bin/env bash
# Every check of `make test`, each one run whatever the others said; pytest comes last, so its closing line is.
set -uo pipefail
cd "$(dirname "$0")/.."
bin="$1"; workers="$2"; shift 2
failed=()

check() {
    local name="$1" started=$SECONDS; shift
    echo "== $name: $*"
    if "$@"; then
        echo "== $name: ok ($((SECONDS - started)) s)"
    else
        echo "== $name: FAILED ($((SECONDS - started)) s)"
        failed+=("$name")
    fi
}

check ruff "$bin/ruff" check .
check mypy "$bin/mypy"
check floors "$bin/lint-imports" --no-cache
if ((${#failed[@]})); then before="${failed[*]}"; else before="none"; fi
echo "== failed before pytest: $before"
"$bin/python" -m pytest -n "$workers" "$@" || failed+=(pytest)
if ((${#failed[@]})); then
    echo "== FAILED: ${failed[*]}" >&2
    exit 1
fi
