# Experts over a node, layers over 2 nodes.
GPUS=16 PP=2
PARALLEL_ARGS=(
    --pipeline-model-parallel-size 2
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
)
