#!/usr/bin/env bash
# Arms of docs/results.md on one GPU or two; the two teachers' may run beside one another.
#
#   [LAYER=4 CUDA_VISIBLE_DEVICES=0 SPARE=1] bash benchmarks/arms.sh moe WORK TEXT [SECONDS]
#   [CUDA_VISIBLE_DEVICES=1]         bash benchmarks/arms.sh smollm2|short|scores WORK TEXT
#
# TEXT: what `python benchmarks/fetch_text.py TEXT` wrote. moe: the teacher is trained; the mixers of its hybrid, with layer LAYER left
# to MLA, are trained on the corpus while the teacher writes text of its own and goes on for as many tokens, and every layer is tried in
# LAYER's place; then all of the hybrid follows the logits of the teacher that went on, on both texts, for as many tokens as SECONDS
# (1,700) leave, and beside it the teacher as given goes on for as many. SPARE: the GPU of what runs beside. smollm2: SmolLM2-135M-Instruct
# goes on, and the hybrid that ships follows it on the same text; short: its arms on few tokens; scores: its layers by each score of
# `--layout selected`, at once. Figures: WORK/results/*/*.json. A command that was stopped goes on where it was. Needs what `make setup`
# installs.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mkdir -p "$2" && cd "$2" && pwd) text=$(cd "$3" && pwd)
deadline=$(($(date +%s) + ${4:-1700}))
python=${PYTHON:-python}

# Tokens: the teacher's two stages, each warm-up of the mixers, a layer's trial, a sample of own text, the most for KL; half of what
# SmolLM2 goes on for, and then its hybrid, the short arms, and each warm-up where scores are compared.
short=30e6 long=80e6 warmup=25000000 trial=6000000 sample=10000000 most=900000000 part=15000000 follow=25000000 few=2000000 chosen=4000000
layer=${LAYER:-4} rows=64 few_rows=16 length=1024 lanes=2048
folder=$work/moe teacher=$work/moe/run/models/ling-moe smol=$work/SmolLM2-135M-Instruct

say() { echo "== $(date +%T) $*"; }
openling() { "$python" -m openling "$@"; }
arms() { "$python" benchmarks/migration.py --length $length "$@"; }
beside() { CUDA_VISIBLE_DEVICES=${SPARE:-${CUDA_VISIBLE_DEVICES:-0}} "$@"; }

manuals() { # manuals FOLDER PACKAGE...: all packages but these, in a folder of links
  mkdir -p "$1"
  local file name
  for file in "$text"/*.jsonl; do
    name=$(basename "$file" .jsonl)
    [[ " ${*:2} " == *" $name "* ]] || ln -sf "$file" "$1/"
  done
}

muon() { # all of every mixer, Muon, in the warm-ups that are named
  for w in "$@"; do echo "--$w.trainable attention --$w.train.optimizer muon --$w.train.lr 0.002 --$w.train.max_skips 3"; done
}

own_text() { # sample by sample until the mixers are trained; every second one warmer, so that it goes where the corpus does not
  mkdir -p "$folder/samples"
  for i in 0 1 2 3 4 5; do
    [ -e "$work/mixers.done" ] && break
    openling data sample "$teacher" "$folder/sample$i" --tokens $sample --batch $lanes --max-new-tokens $((length - 1)) \
      --temperature "$([ $((i % 2)) = 0 ] && echo 1.0 || echo 1.4)" --seed "$i" || break
    for file in "$folder/sample$i"/*.jsonl; do ln -sf "$file" "$folder/samples/$i-$(basename "$file")"; done
  done
}

moe() {
  say teacher
  manuals "$work/moe-text" python3.11-doc rust-doc sagemath-doc
  "$python" benchmarks/moe_teacher.py "$folder" "$work/moe-text" --results "$work/results/moe/moe-teacher.json" \
    -- --set stages.short.tokens=$short --set stages.ling-moe.tokens=$long
  beside own_text > "$work/own.log" 2>&1 &
  local sampler=$!
  beside arms "$teacher" "$folder" continued --text "$folder/corpus" --tokens $((2 * warmup)) --rows $rows \
    --results "$work/results/moe" > "$work/continued.log" 2>&1 &
  local corrected=$!
  [ -e "$work/results/moe/selection.json" ] ||
    beside "$python" benchmarks/selection.py "$teacher" --text "$folder/corpus" --tokens $trial \
      --results "$work/results/moe/selection.json" > "$work/selection.log" 2>&1 &
  local trials=$!
  say "layer $layer"
  # shellcheck disable=SC2046
  arms "$teacher" "$folder" best-all-mixers --text "$folder/corpus" --tokens $warmup --rows $rows --results "$work/results/moe" \
    -- --layout "$layer" $(muon linear_warmup mla_warmup)
  touch "$work/mixers.done"
  wait $sampler $corrected
  local texts=("$folder/corpus")
  say own text
  if [ -n "$(ls "$folder/samples")" ]; then
    [ -e "$folder/own" ] || openling data build "own=$folder/samples" "$folder/own" --tokenizer "$folder/tokenizer"
    texts+=("$folder/own")
  fi
  local half
  half=$("$python" - "$folder/best-all-mixers-0.run" $((deadline - $(date +%s) - 75)) $warmup $most "${SPARE:+alone}" << 'END'
import json, statistics, sys
from pathlib import Path
run, left, least, most = Path(sys.argv[1]), *map(int, sys.argv[2:5])
metrics = run / json.loads((run / "report.json").read_text())["stages"][-1]["metrics"]
speed = statistics.median(json.loads(line)["tokens_per_s"] for line in metrics.read_text().splitlines()[-100:])
share = 0.8 if sys.argv[5] else 0.5  # all parameters: more to do than for the mixers; a teacher beside it takes its part
print(max(least, min(most, int(share * speed * left)) // 2))
END
  )
  say "trained-on-corrected, 2 x $half; continued, 2 x $((half + warmup))"
  beside arms "$teacher" "$work/longer" continued --text "${texts[@]}" --tokens $((half + warmup)) --rows $rows \
    --results "$work/results/longer" > "$work/longer.log" 2>&1 &
  local longer=$!
  arms "$teacher" "$folder" trained-on-corrected --after best-all-mixers --seen $((2 * warmup)) --text "${texts[@]}" --tokens "$half" \
    --rows $rows --rate 5e-4 --results "$work/results/moe"
  say continued
  wait $trials $longer
  say end
}

smollm2_and_text() {
  [ -e "$smol" ] || "$python" -c "
import torch
from openling.weights.gguf import import_gguf, smollm2_gguf
import_gguf(smollm2_gguf(), '$smol', dtype=torch.bfloat16)"
  [ -e "$work/docs" ] && return
  manuals "$work/smollm2-text" python3.11-doc rust-doc sagemath-doc sqlite3-doc vim-doc # those that the main arm learned from
  openling data build "text=$work/smollm2-text" "$work/docs" --tokenizer "$smol" --synthesis recall:share=0.1
}

smollm2() {
  say import
  smollm2_and_text
  [ -e "$work/shipped/best-all-mixers-0" ] ||
    openling delta apply "$smol" src/openling/shipped/SmolLM2-135M-hybrid "$work/shipped/best-all-mixers-0"
  say continued
  arms "$smol" "$work/shipped" continued --text "$work/docs" --tokens $part --rows $rows --results "$work/results/shipped"
  say trained-on-corrected
  arms "$smol" "$work/shipped" trained-on-corrected --seen 0 --text "$work/docs" --tokens $follow --rows $rows --rate 5e-4 \
    --results "$work/results/shipped"
  say end
}

short() {
  smollm2_and_text
  for arm in best paper scratch best-without-kl pure-linear continued; do
    say "short: $arm"
    arms "$smol" "$work/short" "$arm" --text "$work/docs" --tokens $few --rows $few_rows --results "$work/results/short"
  done
  say end
}

scores() {
  smollm2_and_text
  local score layers running=()
  for score in near kl local even; do
    layers="--layout selected --conversion.layer_score $score"
    [ $score = even ] && layers="--layout ling"
    # shellcheck disable=SC2046,SC2086
    arms "$smol" "$work/scores/$score" best-all-mixers --text "$work/docs" --tokens $chosen --rows $few_rows \
      --results "$work/results/scores/$score" -- $layers $(muon linear_warmup mla_warmup) > "$work/score-$score.log" 2>&1 &
    running+=($!)
  done
  for arm in "${running[@]}"; do wait "$arm"; done # one that failed is not passed over
  say end
}

case $1 in
  moe) moe ;;
  smollm2) smollm2 ;;
  short) short ;;
  scores) scores ;;
  *) echo "usage: bash benchmarks/arms.sh moe|smollm2|short|scores WORK TEXT [SECONDS]" >&2; exit 2 ;;
esac
