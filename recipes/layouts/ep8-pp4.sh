# Experts over a node, layers over 4 nodes.
GPUS=32 PP=4
PARALLEL_ARGS=(
    --pipeline-model-parallel-size 4
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
)
