# Experts over a node, layers over 8 nodes, each dense layer over 2 GPUs.
GPUS=64 PP=8
# Megatron asks for it where tensor parallelism is on, before Blackwell.
ENVIRONMENT=(CUDA_DEVICE_MAX_CONNECTIONS=1)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 --sequence-parallel
    --pipeline-model-parallel-size 8
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
)
