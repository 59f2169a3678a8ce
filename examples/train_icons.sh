#!/usr/bin/env bash
# Goes on with the training of `icons` on a GPU, then trains its drafters:
#
#     bash examples/train_icons.sh IMAGES OUT [MINUTES [DRAFTER_MINUTES [SAMPLED]]]
#
# IMAGES is what `visar train images` makes, or a zip of it. The GPT is saved in OUT/ar/gpt every three minutes and at the end of its
# MINUTES; the model with its drafters is then in OUT/model, and the log of each step in OUT/logs. A GPU has run the step of the GPT only:
# the drafters' steps ran on a CPU.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: bash examples/train_icons.sh IMAGES OUT [MINUTES [DRAFTER_MINUTES [SAMPLED]]]" >&2
  exit 2
fi
images=$1 out=$2 minutes=${3:-5} drafter_minutes=${4:-1} sampled=${5:-4096} batch=${BATCH:-384}
icons=$(python -c "from visar.families.catalogue import embedded_folder; print(embedded_folder('icons'))")
mkdir -p "$out/logs"
run() {  # NAME ARGUMENTS...: a step with a log of its own
  local log=$out/logs/$1.txt
  shift
  echo "visar train $*"
  python -m visar train "$@" >"$log" 2>&1 || { tail -n 3 "$log"; return 1; }
}

run ar ar --data "$images" --out "$out/ar" --size 128 --tokenizer "$icons/vq" --words "$icons/text_encoder" \
  --init "$icons/gpt" --variants 48 --without-groups symbols --batch "$batch" --minutes "$minutes" --lr 2e-3 --no-compile \
  --weigh "flat=0.3,noto=0.25,twemoji=0.2,glossy=0.15,blob=0.08,emojione=0.05,rendered=0.1,streamline=0.04,fxemoji=0.05,people & body=0.5"
run assemble assemble --gpt "$out/ar/gpt" --tokenizer "$icons/vq" --words "$out/ar/text_encoder" \
  --guidance-scale 3 --top-k 10 --gpt-dtype float8_e4m3fn --out "$out/model"

drafter=(drafter --model "$out/model" --captions "$images" --styles "3d,noto,flat" --without-groups symbols
  --out "$out/drafters" -n "$sampled" --dtype float32 --no-compile)
run skip "${drafter[@]}" --kind skip --steps 1 --batch 64 --stored-as float8_e4m3fn  # which samples the images
started=()
for kind in eagle medusa hydra exit model; do
  run "$kind" "${drafter[@]}" --kind "$kind" --batch 32 --minutes "$drafter_minutes" --stored-as float8_e4m3fn &
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
