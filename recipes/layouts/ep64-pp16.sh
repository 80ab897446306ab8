# Experts over 8 nodes, layers over 16 times 8 nodes: as DeepSeek-V3 (arXiv:2412.19437, section 3.2).
GPUS=1024 PP=16
PARALLEL_ARGS=(
    --pipeline-model-parallel-size 16
    --expert-model-parallel-size 64 --expert-tensor-parallel-size 1
)
