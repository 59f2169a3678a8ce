#!/usr/bin/env bash
# Goes on with the training of `icons`, `icons-mar` and `icons-two-way` on a GPU, then trains the drafters of `icons`:
#
#     bash examples/train_icons.sh IMAGES OUT [MINUTES [MAR_MINUTES [DRAFTER_MINUTES [SAMPLED [TWO_WAY_MINUTES]]]]]
#
# IMAGES is what `visar train images` makes, or a zip of it. Each network is saved in OUT (ar/gpt, mar/mar, draft/mar, two-way/gpt) every
# three minutes and at the end of its MINUTES; the draft model of the MAR has half of them. OUT/model, with its drafters, OUT/model-mar
# and OUT/model-two-way are what comes of it, and the log of each step is in OUT/logs. A GPU has run the step of the GPT only: the
# others ran on a CPU.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: bash examples/train_icons.sh IMAGES OUT [MINUTES [MAR_MINUTES [DRAFTER_MINUTES [SAMPLED [TWO_WAY_MINUTES]]]]]" >&2
  exit 2
fi
images=$1 out=$2 minutes=${3:-5} mar_minutes=${4:-2} drafter_minutes=${5:-1} sampled=${6:-4096} two_way_minutes=${7:-$mar_minutes} batch=${BATCH:-384}
assets=$(python -c "from visar.families.catalogue import embedded_folder; print(embedded_folder('icons').parent)")
mkdir -p "$out/logs"
rm -rf "$out/model" "$out/model-mar" "$out/model-two-way"  # of a run that goes on: they are made anew
run() {  # NAME ARGUMENTS...: a step with a log of its own
  local log=$out/logs/$1.txt
  shift
  echo "visar train $*"
  python -m visar train "$@" >"$log" 2>&1 || { tail -n 3 "$log"; return 1; }
}

gpt=(--data "$images" --size 128 --tokenizer icons --words icons --variants 48
  --without-groups symbols --batch "$batch" --lr 2e-3 --no-compile
  --weigh "flat=0.3,noto=0.25,twemoji=0.2,glossy=0.15,blob=0.08,emojione=0.05,rendered=0.1,streamline=0.04,fxemoji=0.05,people & body=0.5")
run ar ar "${gpt[@]}" --out "$out/ar" --init icons --minutes "$minutes"
run assemble assemble --gpt "$out/ar/gpt" --tokenizer "$assets/icons/vq" --words "$out/ar/text_encoder" \
  --guidance-scale 3 --top-k 10 --gpt-dtype int8 --out "$out/model"

masked=(mar --data "$images" --size 128 --varied --autoencoder icons-mar --words icons --styles 3d
  --without-groups symbols --weigh "people & body=0.4" --batch "$batch" --no-compile)
run mar "${masked[@]}" --out "$out/mar" --init icons-mar --minutes "$mar_minutes" --lr 2e-3
run draft "${masked[@]}" --out "$out/draft" --init "$assets/icons-mar/draft" --minutes "$(python -c "print($mar_minutes / 2)")" --lr 2e-3 \
  --dim 96 --layers 2 --heads 1 --head-width 128 --head-layers 2
run assemble-mar assemble --mar "$out/mar/mar" --draft "$out/draft/mar" --autoencoder icons-mar --words icons \
  --guidance-scale 2 --draft-dtype int8 --out "$out/model-mar"
mkdir -p "$out/model-mar/text_encoder"
cp "$out/mar/text_encoder/concepts.json" "$out/model-mar/text_encoder/"  # its own list; the words are those of icons

run two-way two-way "${gpt[@]}" --out "$out/two-way" --init icons-two-way --stage 2 --minutes "$two_way_minutes"
run assemble-two-way assemble --gpt "$out/two-way/gpt" --tokenizer icons --words icons \
  --guidance-scale 3 --top-k 10 --gpt-dtype int6 --out "$out/model-two-way"
mkdir -p "$out/model-two-way/text_encoder"
cp "$out/two-way/text_encoder/concepts.json" "$out/model-two-way/text_encoder/"

drafter=(drafter --model "$out/model" --captions "$images" --styles "3d,noto,flat" --without-groups symbols
  --out "$out/drafters" -n "$sampled" --dtype float32 --no-compile)
rm -rf "$out/drafters/model/acceptance" "$out/drafters/model-acceptance-run"  # a drafter that has a head is trained no further
run skip "${drafter[@]}" --kind skip --steps 1 --batch 64 --stored-as int8  # which samples the images
started=()
for kind in eagle medusa hydra exit model; do
  run "$kind" "${drafter[@]}" --kind "$kind" --batch 32 --minutes "$drafter_minutes" --stored-as int8 &
  started+=($!)
done
for process in "${started[@]}"; do
  wait "$process"
done
for kind in skip eagle medusa hydra exit model; do
  cp -r "$out/drafters/$kind" "$out/model/"
done
run acceptance "${drafter[@]}" --kind model --acceptance --batch 16 --steps 600 --stored-as float16
cp -r "$out/drafters/model" "$out/model/"
