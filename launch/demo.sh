#!/usr/bin/env bash
# The main job, end to end, with the commands a user would type: corpus, prepare, stage 1, stage 2, prune, distil, release, check.
# Usage: launch/demo.sh [FOLDER]   (default runs/demo; an older demo there is replaced, anything else is not)
set -euo pipefail
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
folder="${1:-runs/demo}"

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

marker="$folder/.made_by_f2llm_jax_demo"
if [[ -e "$folder" && ! -e "$marker" && -n "$(ls -A -- "$folder")" ]]; then
  echo "${0##*/}: $folder is not empty and no demo; choose another folder" >&2
  exit 2
fi
rm -rf -- "$folder"
mkdir -p -- "$folder"
touch -- "$marker"

say "Corpus: CLDR names in more than 200 languages, docstrings and code"
python -m f2llm_jax.demo_data --out "$folder/corpus"

say "Prepare: text to token ids, for both stages at once"
prepare() {
  python -m f2llm_jax.prepare --raw "$folder/corpus/raw" --tokenizer "$folder/corpus/tokenizer" \
    --out "$folder/stage$1-data" --stage "$1" --max-length 64 >"$folder/prepare$1.log" 2>&1 || { cat "$folder/prepare$1.log"; return 1; }
}
prepare 1 & first=$!
prepare 2 & second=$!
wait "$first"
wait "$second"
cat "$folder/prepare1.log" "$folder/prepare2.log"

say "Stage 1: retrieval without instructions, from random weights"
python -m f2llm_jax.main --config configs/stage1.py:runlocal --workdir "$folder/stage1" \
  --config.data.folder="$folder/stage1-data" --config.steps=480 --config.checkpoint.every=1000 --config.eval.every=240 --config.optimizer.learning_rate=8e-3

say "Stage 2: all task kinds with instructions, from stage 1"
python -m f2llm_jax.main --config configs/stage2.py:runlocal --workdir "$folder/stage2" --config.init="$folder/stage1" \
  --config.data.folder="$folder/stage2-data" --config.steps=320 --config.checkpoint.every=1000 --config.eval.every=160 --config.optimizer.learning_rate=8e-3

say "Prune: half of stage 1's width, by what its channels do on real texts"
python -m f2llm_jax.prune --model "$folder/stage1" --target hidden=64,ffn=128 --data "$folder/stage2-data" --calibration-rows 512 \
  --out "$folder/pruned"

say "Stage 2 of the pruned model, distilled from the whole one"
python -m f2llm_jax.main --config configs/stage2.py:runlocal --workdir "$folder/small" --config.init="$folder/pruned" \
  --config.teacher="$folder/stage2" --config.data.folder="$folder/stage2-data" \
  --config.steps=160 --config.checkpoint.every=1000 --config.eval.every=160 --config.optimizer.learning_rate=8e-3

say "Release: folders that sentence-transformers loads"
python -m f2llm_jax.convert to-hf "$folder/stage2" "$folder/model"
python -m f2llm_jax.convert to-hf "$folder/small" "$folder/model-small"
python -m f2llm_jax.convert verify "$folder/model"

say "Held-out retrieval, before training [1], of the small model [2] and of the whole one [3]"
python -m f2llm_jax.recall --model "$folder/stage1/checkpoints/0" --model "$folder/model-small" --model "$folder/model" --dims 32,full \
  --pairs "$folder/corpus/heldout/bitext.parquet" "$folder/corpus/heldout/zero_shot.parquet" "$folder/corpus/heldout/code.parquet"

say "Report"
python -m f2llm_jax.report "$folder/stage2" "$folder/small" --out "$folder/report"
say "Done: $folder/model, $folder/model-small, $folder/report/report.html"
