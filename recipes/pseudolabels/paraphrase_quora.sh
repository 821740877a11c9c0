#!/usr/bin/env bash
# Generation by sampling: several paraphrases per question, each with its log-probability.
#   TEACHER=runs/quora_agnews/teacher DATA=../shared/data recipes/pseudolabels/paraphrase_quora.sh
set -euo pipefail
TEACHER=${TEACHER:-bigscience/T0_3B}
DATA=${DATA:-../shared/data}
OUT=${OUT:-runs/labels_quora}

rlkd generate-pseudolabels --teacher "$TEACHER" --dataset "$DATA/quora_para/test.jsonl" --limit "${LIMIT:-1000}" \
    --input-column source --reference-column target --templates "quora_para:Paraphrase the question" \
    --strategy sample --labels-per-input 2 --temperature "${TEMPERATURE:-1.0}" --max-new-tokens 32 \
    --max-input-tokens "${MAX_INPUT_TOKENS:-512}" --out "$OUT" "$@"
rlkd data verify "$OUT"
rlkd data score "$OUT" --metric bleu --metric rouge
