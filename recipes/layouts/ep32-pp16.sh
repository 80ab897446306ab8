# Experts over 4 nodes, layers over 16 times 4 nodes.
GPUS=512 PP=16
PARALLEL_ARGS=(
    --pipeline-model-parallel-size 16
    --expert-model-parallel-size 32 --expert-tensor-parallel-size 1
)
