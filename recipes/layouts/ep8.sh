# Experts over the GPUs of a node.
GPUS=8
PARALLEL_ARGS=(
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
)
