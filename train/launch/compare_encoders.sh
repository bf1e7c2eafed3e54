#!/bin/sh
# Which encoder serves a small vision-language model best? Base encoders of about equal size, then the
# quickstart's stages once for each, scored and compared in one table (OUT/ablation/table.md).
#
#   train/launch/compare_encoders.sh [--a.b=value...]     overrides of the recipe, for all encoders
#
# Needs a finished quickstart: its data and its language model are used as they are, so the encoder is
# all that differs. Goes on where it was stopped.
set -eu
vlm=${VLM:-.venv/bin/vlm}
quickstart=${QUICKSTART:-runs/quickstart}
out=${OUT:-runs/encoders}
seed=${SEED:-0}
encoders=
for name in ${ENCODERS:-vit mambaout vim vmamba}; do
    folder=$out/$name/encoder
    "$vlm" base encoder --recipe "train/recipes/base-encoder-$name.yaml" --out "$folder" --seed "$seed"
    encoders=$encoders${encoders:+,}$folder
done
"$vlm" ablate train/recipes/quickstart.yaml --vary "encoder=$encoders" --seed "$seed" \
    --data "$quickstart/data/test.parquet" --out "$out/ablation" \
    --model.language_model "$quickstart/base/language_model" \
    --stages.align.data.sources.captions.path "$quickstart/data/train/captions.jsonl" \
    --stages.instruct.data.sources.questions.path "$quickstart/data/train/questions.jsonl" \
    --stages.instruct.data.sources.captions.path "$quickstart/data/train/captions.jsonl" "$@"
