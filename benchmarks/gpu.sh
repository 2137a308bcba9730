#!/usr/bin/env bash
# All figures of a GPU in one go: bash benchmarks/gpu.sh [MINUTES [FOLDER-OR-ID-OF-CIFAR-10 [OF-AFHQ]]]
# Speed beside the plain diffusers loop (float32 and bf16), model FLOP utilisation, sampling; then MINUTES of the
# cifar10 recipe and of afhq-cat-64, each with its sample sheet, validation loss and bits/dim. PEAK_TFLOPS is the GPU's
# dense bf16 peak by its data sheet (H200: 989; A100: 312; L4: 121).
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=${1:-10} cifar10=${2:-uoft-cs/cifar10} afhq=${3:-huggan/AFHQ} out=${OUT:-runs/gpu}
mkdir -p "$out"
python benchmarks/speed.py --preset cifar10 --dataset_name "$cifar10" --parts data,training,sampling --steps 20 \
    --images 256 --num_inference_steps 50 --peak_tflops "${PEAK_TFLOPS:-989}" --json "$out/speed.json"
python benchmarks/speed.py --preset cifar10 --dataset_name "$cifar10" --parts training --steps 20 --torch_compile \
    --peak_tflops "${PEAK_TFLOPS:-989}" --json "$out/speed_compiled.json"
for recipe in "cifar10 $cifar10" "afhq-cat-64 $afhq"; do
    read -r preset data <<<"$recipe"
    # SIGTERM is answered with a checkpoint and the pipeline so far; an EMA of 0.9999 would still be noise by then.
    timeout --signal TERM "${minutes}m" python train_unconditional.py --preset "$preset" --dataset_name "$data" \
        --output_dir "$out/$preset" --ema_inv_gamma 1 --ema_max_decay 0.999 --logging_steps 50 || [ $? = 124 ]
    python -m ddpm_hf sample "$out/$preset" --num_images 64 --sampler ddim --output "$out/$preset-samples"
    python -m ddpm_hf evaluate "$out/$preset" --dataset_name "$data" --metrics bits_per_dim --bound_images 256
done
