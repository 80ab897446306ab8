# Experts over 4 nodes.
GPUS=32
PARALLEL_ARGS=(
    --expert-model-parallel-size 32 --expert-tensor-parallel-size 1
)
