#!/usr/bin/env bash
# Reproduces a merge from its lock and judges the result.
#
#   reproduce.sh LOCK TEXT BOUND [OPTION...]
#
#   LOCK      dam_lock.json, or the folder that holds it beside the coefficients
#   TEXT      held-out text, as for `mergekit-dam evaluate --data`
#   BOUND     nats per token that the merged model may lose on it at most
#   OPTION    options of `mergekit-dam reproduce`, such as --models DIR or --refit
#
# Exits with a status other than 0 if a byte differs, if what was written is not what its lock says,
# or if the loss is above the bound. OUT names the folder for the model (default: ./reproduced),
# EVALUATE further options of `mergekit-dam evaluate`.
set -euo pipefail

lock=$1 text=$2 bound=$3
shift 3
out=${OUT:-./reproduced}

mergekit-dam reproduce "$lock" --to "$out" "$@"
mergekit-dam verify "$out"

read -ra options <<< "${EVALUATE:-}"
mergekit-dam evaluate "$out" --data "$text" --json ${options[@]+"${options[@]}"} > losses.json
python - "$bound" <<'PYTHON'
import json, sys

bound, (model,) = float(sys.argv[1]), json.load(open("losses.json"))["models"]
print(f"{model['mean']:.4f} nats per token, at most {bound:g} allowed")
sys.exit(not model["mean"] <= bound)
PYTHON
