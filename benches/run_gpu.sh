#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU is needed for, in one command, within ten minutes and without a network: build, every
# test with the GPU's backends, compute-sanitizer, the benches for GPUs and a summary of every kernel by ncu.
#
#   benches/run_gpu.sh [WHEELS]
#
# WHEELS   folder of wheels of the Python packages that are missing, if any (the first step names them)
# OUT      folder for <gpu>.log, <gpu>.json (a record, as benches/tables.py makes it) and <gpu>-kernels.csv;
#          by default benches/results
# PYTHON   by default python3: an interpreter with a CUDA build of torch
# BUDGET   seconds in all, by default 580: a step gets what is left of them at most
#
# A step that fails does not stop the others. Exit status: 0 all well, 1 something failed, 2 nothing to run on.
set -uo pipefail

export PYTHON=${PYTHON:-python3} WHEELS=${1:-${WHEELS:-}} BUDGET=${BUDGET:-580}

stop() {
  echo "run_gpu.sh: $*" >&2
  exit 2
}

# ---------------------------------------------------------------- what is here

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || stop "cannot find the repository"
OUT=${OUT:-$root/benches/results}
mkdir -p "$OUT" || stop "cannot make the folder OUT=$OUT"
OUT=$(cd "$OUT" && pwd) || exit 2
if [ -n "$WHEELS" ]; then
  [ -d "$WHEELS" ] || stop "there is no folder of wheels $WHEELS"
  WHEELS=$(cd "$WHEELS" && pwd) || exit 2
fi
export OUT
cd "$root" || exit 2

command -v nvidia-smi >/dev/null || stop "no NVIDIA GPU here: nvidia-smi is not on the PATH"
gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>&1) || stop "no NVIDIA GPU here: nvidia-smi says: $gpus"
gpu=${gpus%%$'\n'*}
command -v "$PYTHON" >/dev/null || stop "there is no $PYTHON; name an interpreter by PYTHON="
seen=$("$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.is_available())' 2>&1) ||
  stop "$PYTHON has no torch: ${seen##*$'\n'}"
seen=${seen##*$'\n'}
case $seen in
  *" True") ;;
  *) stop "torch ${seen% *} of $PYTHON sees no CUDA device; it takes a CUDA build of torch and a driver that fits" ;;
esac

name=$(printf '%s' "$gpu" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]\n' - | sed 's/^-//; s/-$//')
work=$(mktemp -d) || stop "cannot make a temporary folder"
trap 'rm -rf "$work"' EXIT
log=$OUT/$name.log
export name work log
: >"$log" || stop "cannot write $log"
: >"$work/summary"

# Nothing but what is installed: not the sources beside it, nor packages from a network. Warnings, errors in CI, are only shown.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export PYTHONPATH=$work/site:$root/benches:$root/tests${PYTHONPATH:+:$PYTHONPATH}
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1
# Deterministic products, which the tests ask for.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
# The programs of the wheels; the CUDA toolkit's, where only the toolkit is installed.
PATH=$work/site/bin:$PATH:${CUDA_HOME:-/usr/local/cuda}/bin

# ---------------------------------------------------------------- steps

note() {
  echo "$*" >>"$work/summary"
  echo "$*"
}

# step NAME SECONDS COMMAND...: run, append its output to the log, remember how it ended.
step() {
  local what=$1 limit=$2 began=$SECONDS left=$((BUDGET - SECONDS)) status verdict
  shift 2
  if ((left < limit)); then limit=$left; fi
  if ((limit < 5)); then
    note "FAILED   $what: not begun, the $BUDGET s are used up"
    return
  fi
  timeout ${SIGNAL:+--foreground --signal="$SIGNAL"} --kill-after=15 "$limit" "$@" >"$work/$what.out" 2>&1 </dev/null
  status=$?
  verdict="$what: exit status $status, $((SECONDS - began)) s"
  if ((status == 124 || status == 137)); then verdict+=", stopped at its limit"; fi
  if ((status == 0)); then verdict="ok       $verdict"; else verdict="FAILED   $verdict"; fi
  # Steps that run beside each other write one after the other.
  {
    flock 9
    printf '\n==================== %s\n' "$verdict"
    cat "$work/$what.out"
  } 9>>"$work/lock" >>"$log"
  note "$verdict"
}

skip() {
  note "skipped  $1: $2"
}

packages() {
  mkdir -p "$work/site"
  if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install --quiet --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl || return
  fi
  "$PYTHON" - <<'EOF'
import sys
from importlib.metadata import PackageNotFoundError, distribution

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib
from pip._vendor.packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    settings = tomllib.load(file)
project = settings["project"]
extras = project["optional-dependencies"]
wanted = [*settings["build-system"]["requires"], *project["dependencies"], *extras["test"]]
seen, missing = {"torch"}, []  # torch is there, and brings its own libraries
while wanted:
    need = Requirement(wanted.pop(0))
    if need.name == project["name"]:
        wanted += [line for extra in need.extras for line in extras[extra]]
        continue
    if need.name.lower() in seen or (need.marker and not need.marker.evaluate({"extra": ""})):
        continue
    seen.add(need.name.lower())
    try:
        found = distribution(need.name)
    except PackageNotFoundError:
        missing.append(f"{need.name}{need.specifier}")
        continue
    if not need.specifier.contains(found.version, prereleases=True):
        missing.append(f"{need.name}{need.specifier} (here {found.version})")
    wanted += found.requires or []
if missing:
    sys.exit(
        f"Missing: {', '.join(missing)}; bring their wheels, and those of what they need in turn, in a folder and name it: "
        "benches/run_gpu.sh FOLDER"
    )
EOF
}

build() {
  export ODER_FAST_CUDA=1
  if ! "$PYTHON" -m pip install --no-build-isolation --no-deps -e .; then
    echo "Not installed into $PYTHON; beside it, in a folder of this run, instead:"
    "$PYTHON" -m pip install --no-build-isolation --no-deps --upgrade --target "$work/site" . || return
  fi
  "$PYTHON" -c '
import oder_fast
info = oder_fast.build_info()
print(oder_fast.__file__, info)
assert info["backends"]["cuda"] == info["backends"]["triton"] == "available", info["backends"]'
}

# One process of pytest: a file, and which of its tests.
tests_of() {
  local file=${1%%|*} which=${1#*|} all='' out status
  # What the kernels are compiled to, and all their shapes, too.
  case $file in *test_gpu_backends*) all=--all ;; esac
  out=$work/$(basename "$file" .py).$(printf '%s' "$which" | tr -c '[:alnum:]\n' -).pytest
  "$PYTHON" -m pytest -q -W default -rfE --tb=short --durations=3 --durations-min=5 -p no:cacheprovider \
    --continue-on-collection-errors $all ${which:+-k "$which"} "$file" >"$out" 2>&1
  status=$?
  # None selected is nothing wrong.
  if ((status == 5)); then status=0; fi
  {
    flock 9
    printf '\n---- %s %s: exit status %s\n' "$file" "$which" "$status"
    cat "$out"
  } 9>>"$work/tests.lock"
  rm "$out"
  return "$status"
}

tests() {
  local file
  # Stopped at the limit: what has not come to its end.
  trap 'tail -n 20 "$work"/*.pytest' TERM
  export OMP_NUM_THREADS=1
  parts() { printf '%s\n' "${@/#/$file|}"; }
  # shellcheck disable=SC2016
  for file in tests/test_*.py; do
    case $file in
      # What takes longest, in parts: each backend by itself, and kernels that Triton compiles shared among several.
      tests/test_operators.py)
        parts "cuda and not triton" "not cuda and not triton" "triton and fourier" "triton and not fourier and not radon" \
          "triton and not fourier and radon and red_update" "triton and not fourier and radon and not red_update"
        ;;
      tests/test_on_gpu.py)
        parts "cuda and not triton" "not cuda and not triton" "triton and graph" "triton and not graph"
        ;;
      tests/test_gpu_backends.py)
        parts "cuda and compiles" "cuda and not compiles" "triton and not cuda" "not cuda and not triton"
        ;;
      tests/test_trainer.py) parts "process" "killed and not process" "not process and not killed" ;;
      tests/test_cli.py) parts "idt" "mri and not idt" "not idt and not mri" ;;
      *) parts "" ;;
    esac
  done | sort -t '|' -k 2r | xargs -P "$(nproc)" -I '{}' bash -c 'tests_of "$1"' _ '{}'
}

# Each allocation by itself, so that what lies beyond its end is seen; only our kernels are watched.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 compute-sanitizer --tool "$1" --kernel-name kns=oder \
    --report-api-errors no --error-exitcode 9 --print-limit 20 "$PYTHON" benches/launch_kernels.py small
}

profile() {
  set -o pipefail
  local metrics=gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
  ncu --clock-control none --profile-from-start off --kernel-name-base demangled \
    --kernel-name 'regex:oder::|^_(radon|fourier|diffraction|red)_' --metrics "$metrics" \
    --force-overwrite --export "$work/kernels" "$PYTHON" benches/launch_kernels.py paper || return
  ncu --import "$work/kernels.ncu-rep" --csv --page raw --print-units base | grep -v '^==' >"$OUT/$name-kernels.csv"
}

export -f packages build tests tests_of sanitize profile

# ---------------------------------------------------------------- the run

{
  date -u '+%Y-%m-%d %H:%M UTC'
  nvidia-smi
  echo "$PYTHON: torch $seen"
  "$PYTHON" -m pip list 2>&1
  nvcc --version 2>&1
} >>"$log"

step packages 60 bash -c packages
if [ "$(tail -n 1 "$work/packages.out" | cut -c 1-8)" = "Missing:" ]; then tail -n 1 "$work/packages.out"; fi
step build 200 bash -c build
step tests 210 bash -c tests &
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    # initcheck would tell nothing: tests fill fresh memory with NaN and look for it.
    step "$tool" 210 bash -c "sanitize $tool" &
  done
else
  for tool in memcheck racecheck synccheck; do skip "$tool" "compute-sanitizer is not on the PATH"; done
fi
wait
# Interrupted, the benches still write what they have.
SIGNAL=INT step benches 200 "$PYTHON" -m pytest benches --benchmark -q -W default -k test_gpu -p no:cacheprovider \
  --benchmark-json="$work/raw.json"
if [ -s "$work/raw.json" ]; then
  step table 10 "$PYTHON" benches/tables.py "$work/raw.json" "$OUT/$name.json"
else
  skip table "the benches wrote no JSON"
fi
if command -v ncu >/dev/null; then
  step ncu 120 bash -c profile
else
  skip ncu "ncu (Nsight Compute) is not on the PATH"
fi

{
  printf '\n%s, torch %s, %s s in all; %s\n' "$gpu" "${seen% *}" "$SECONDS" "$log"
  cat "$work/summary"
} | tee -a "$log"
! grep -q '^FAILED' "$work/summary"
