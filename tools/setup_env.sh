#!/usr/bin/env bash
# Set up the Python environment of this repository; done already, it returns at once.
#   bash tools/setup_env.sh          makes .venv with the pinned CPU packages and the project itself
# MM_VENV=DIR      another place for the environment (default: .venv in the repository)
# MM_VENV=active   install nothing and take the `python` on PATH with what it has: for machines with their own torch
# MM_PYTHON=PROG   the Python to make it with (default: the first of python3, python3.12, python3.11 that is 3.11 or 3.12)
# The last line on standard output is the environment's directory; everything else goes to standard error.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MM_VENV:-$ROOT/.venv}"
CONSTRAINTS="$ROOT/constraints/cpu.txt"
STAMP="$VENV/.mindspeed_mm_ready"
# The older megatron-core that Ascend users are bound to lies beside the pinned one; tests put it first with PYTHONPATH.
OLDER_MEGATRON=0.12.1

say() { echo "setup: $*" >&2; }

is_supported() {  # a program that runs and is Python 3.11 or 3.12
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n "${MM_PYTHON:-}" ]]; then
        if is_supported "$MM_PYTHON"; then echo "$MM_PYTHON"; return; fi
        say "MM_PYTHON=$MM_PYTHON is not a Python 3.11 or 3.12 ($("$MM_PYTHON" --version 2>&1 || true))"
        exit 11
    fi
    for candidate in python3 python3.12 python3.11; do
        if is_supported "$candidate"; then echo "$candidate"; return; fi
    done
    say "Python 3.11 or 3.12 is needed; python3 here is: $(python3 --version 2>&1 || true)"
    say "install one of them, or name it: MM_PYTHON=/path/to/python3.11 bash $0"
    exit 11
}

install_older_megatron() {  # megatron-core OLDER_MEGATRON without its dependencies, in a directory of its own
    local target="$VENV/megatron-core-$OLDER_MEGATRON" staging="$VENV/.megatron-core.part"
    [[ -d "$target" ]] && return
    say "installing megatron-core $OLDER_MEGATRON beside it"
    rm -rf "$staging"
    mkdir "$staging"
    # The wheel of one Python and machine serves all: only its Python sources are used, never its compiled data helper.
    # From the source package, all there is for Python 3.12, a C++ compiler would have to build that helper.
    "$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --only-binary :all: \
        --python-version 3.11 --implementation cp --abi cp311 --platform manylinux_2_28_x86_64 \
        --target "$staging" "megatron-core==$OLDER_MEGATRON" >&2
    mv "$staging" "$target"
}

# What the environment is made of: when none of it has changed since the last time, there is nothing to do.
fingerprint() { cat "$ROOT/setup.py" "$CONSTRAINTS" "$ROOT/tools/setup_env.sh" | cksum; echo "$ROOT"; }

if [[ -x "$VENV/bin/python" && -f "$STAMP" && "$(cat "$STAMP")" == "$(fingerprint)" ]]; then
    echo "$VENV"
    exit 0
fi

if [[ "$VENV" == active ]]; then
    python -c 'import sys; print(sys.prefix)'
    exit 0
fi

start=$SECONDS
if [[ ! -x "$VENV/bin/python" ]]; then
    python="$(find_python)"
    say "making $VENV with $("$python" --version)"
    if ! "$python" -m venv "$VENV" >&2; then
        rm -rf "$VENV"
        say "'$python -m venv' failed; on Debian and Ubuntu the module is in the package python3-venv"
        exit 11
    fi
elif ! is_supported "$VENV/bin/python"; then
    say "$VENV was made with $("$VENV/bin/python" --version 2>&1); Python 3.11 or 3.12 is needed"
    say "remove that directory or set MM_VENV to another one"
    exit 11
fi

pip=("$VENV/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$CONSTRAINTS")
say "installing the pinned packages (a first run downloads a few hundred MB)"
"${pip[@]}" setuptools >&2
# Without build isolation the project is built by the setuptools pinned above, and nothing else is downloaded for it.
"${pip[@]}" --no-build-isolation --editable "$ROOT[test,video,lora,mossvl]" >&2
install_older_megatron
fingerprint >"$STAMP"
say "ready after $((SECONDS - start)) s"
echo "$VENV"
