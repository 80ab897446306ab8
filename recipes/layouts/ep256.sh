# Experts over 32 nodes, nothing else split.
GPUS=256
PARALLEL_ARGS=(
    --expert-model-parallel-size 256 --expert-tensor-parallel-size 1
)
