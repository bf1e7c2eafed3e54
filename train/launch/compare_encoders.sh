#!/bin/sh
# Which encoder serves a small vision-language model best? The quickstart's stages once for each.
#
#   train/launch/compare_encoders.sh [NAME...]      NAME: vit mambaout vim vmamba; all by default
#
# Needs a finished quickstart: its data and its language model are used as they are, so the encoder is
# all that differs. Goes on where it was stopped.
set -eu
vlm=${VLM:-.venv/bin/vlm}
quickstart=${QUICKSTART:-runs/quickstart}
out=${OUT:-runs/encoders}
seed=${SEED:-0}
[ $# -gt 0 ] || set -- vit mambaout vim vmamba
for name in "$@"; do
    folder=$out/$name-$seed
    "$vlm" base encoder --recipe "train/recipes/base-encoder-$name.yaml" --out "$folder/encoder" \
        --seed "$seed"
    "$vlm" train train/recipes/quickstart.yaml --seed "$seed" --output_dir "$folder/vlm" \
        --model.vision_encoder "{source: $folder/encoder}" \
        --model.language_model "$quickstart/base/language_model" \
        --stages.align.data.sources.captions.path "$quickstart/data/train/captions.jsonl" \
        --stages.instruct.data.sources.questions.path "$quickstart/data/train/questions.jsonl" \
        --stages.instruct.data.sources.captions.path "$quickstart/data/train/captions.jsonl"
    "$vlm" eval "$folder/vlm/instruct" --tasks cv_bench --max-new-tokens 64 --no-blind \
        --data "$quickstart/data/test.parquet" --out "$folder/eval"
done
