# Experts over 2 GPUs, or over 2 processes of a machine without any.
GPUS=2
PARALLEL_ARGS=(
    --expert-model-parallel-size 2 --expert-tensor-parallel-size 1
)
