#!/usr/bin/env bash
# A CI job from end to end, offline, on the bundled model: train, prune, and three reports whose exit codes are 0 (all
# budgets met), 1 (quality fell by more than it may) and 3 (a broken file). Shows the summary that a runner would.
#
#   benchmarks/ci_job.sh [STEPS]        20 by default: half a minute on two cores
set -euo pipefail
steps=${1:-20}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export GITHUB_STEP_SUMMARY="$work/summary.md" # as a runner sets it

expect() { # CODE COMMAND...
  local wanted=$1 code=0
  shift
  "$@" > "$work/said.txt" || code=$?
  if [ "$code" != "$wanted" ]; then
    echo "exit code $code, not $wanted: $*" >&2
    exit 1
  fi
  echo "exit code $code: $*"
}

expect 0 lpsparse finetune bundled:stories260k trained --data bundled:shakespeare --task causal-lm \
  --split 'train[:20000]' --eval-split 'validation[:4000]' --max-length 64 --batch-size 8 --steps "$steps" \
  --target-sparsity 0.8 --lr 1e-5 --quiet # a learning rate at which what was cut is not made good
expect 0 lpsparse prune trained sparse --sparsity 0.8 --quiet # nothing more to cut: the quality stays recorded
expect 0 lpsparse verify sparse trained

expect 0 lpsparse report sparse trained --min-sparsity 0.8 --max-quality-drop 9 --junit budgets.xml --json report.json
expect 1 lpsparse report sparse --min-sparsity 0.8 --max-quality-drop 0.01
expect 1 lpsparse report report.json --max-bytes 1B # budgets on an old report, without its weights
head -c 100 sparse/model.safetensors > broken.safetensors
expect 3 lpsparse report broken.safetensors

echo
cat "$GITHUB_STEP_SUMMARY"
