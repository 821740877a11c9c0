#!/usr/bin/env bash
# Labels, warm-up and RL on a SLURM cluster: an array of label jobs, the merge of their parts, then the two trainings, each
# submitted to start when the one before it has ended well. After a failure repeat the command: only what is not finished is
# submitted, a part or a training that was begun continues, and a training that is finished ends at once. While jobs of the
# same OUT still wait or run, nothing is submitted (exit code 75): the scheduler is asked for their comment.
#
#   PARTS=16 OUT=runs/labels WARM_UP=warm_up.yaml RL=ppo.yaml recipes/cluster/submit.sh FLAGS
#
# FLAGS: those of `rlkd generate-pseudolabels`, without --out and --shard. PARTS: label jobs; keep it when you repeat.
# WARM_UP, RL: settings of `rlkd train seqkd` and `rlkd train ppo` (leave out what you do not want). JOB=reinforce: another
# job for RL. SBATCH: flags of sbatch for all jobs, such as "--partition=gpu --account=mine".
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${PARTS:?number of label jobs}" "${OUT:?folder of the labels}"
read -ra flags <<< "${SBATCH:-}"

mark="rlkd:$(realpath -m "$OUT")"
queued=$(squeue --me --noheader --format="%i %k")
waiting=$(awk -v mark="$mark" '{ id = $1; sub(/^[^ ]+ /, ""); if ($0 == mark) printf " %s", id }' <<< "$queued")
if [[ -n $waiting ]]; then
    echo "error: jobs of $OUT still wait or run:$waiting. Repeat when they have ended, or cancel them: scancel$waiting" >&2
    exit 75
fi

submit() {  # the number of the job; the first argument is the number of the one to wait for, or nothing
    local after=$1
    shift
    sbatch --parsable --comment="$mark" "${flags[@]}" ${after:+--dependency=afterok:$after --kill-on-invalid-dep=yes} "$@"
}

finished() {  # by the last line of a log (docs/pseudolabels.md)
    [[ -f $1 ]] && tail -n 1 "$1" | grep -q '"kind": *"finished"'
}

job=
if ! finished "$OUT/manifest.jsonl"; then
    todo=()
    for ((part = 0; part < PARTS; part++)); do
        finished "$OUT/manifest-$part-of-$PARTS.jsonl" || todo+=("$part")
    done
    if ((${#todo[@]})); then
        job=$(submit "" --array="$(IFS=, && echo "${todo[*]}")" "$here/labels.sbatch" "$PARTS" --out "$OUT" "$@")
        echo "labels: job $job, parts ${todo[*]} of $PARTS"
    fi
    job=$(submit "$job" "$here/merge.sbatch" "$OUT")
    echo "merge: job $job"
fi
if [[ -n ${WARM_UP:-} ]]; then
    job=$(submit "$job" "$here/train.sbatch" seqkd --config "$WARM_UP" --pseudo_labels "$OUT")
    echo "warm-up: job $job"
fi
if [[ -n ${RL:-} ]]; then
    job=$(submit "$job" "$here/train.sbatch" "${JOB:-ppo}" --config "$RL")
    echo "RL: job $job"
fi
