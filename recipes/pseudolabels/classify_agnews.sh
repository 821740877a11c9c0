#!/usr/bin/env bash
# Classification by ranking: the teacher scores a template's answer choices and the most probable one is the label.
#   TEACHER=runs/quora_agnews/teacher DATA=../shared/data recipes/pseudolabels/classify_agnews.sh
set -euo pipefail
TEACHER=${TEACHER:-bigscience/T0_3B}
DATA=${DATA:-../shared/data}
OUT=${OUT:-runs/labels_agnews}

rlkd generate-pseudolabels --teacher "$TEACHER" --dataset "$DATA/agnews/test.jsonl" --limit "${LIMIT:-1000}" \
    --input-column text --reference-column label --templates agnews_names \
    --strategy rank --max-input-tokens "${MAX_INPUT_TOKENS:-512}" --out "$OUT" "$@"
rlkd data verify "$OUT"
rlkd data score "$OUT" --metric exact_match
