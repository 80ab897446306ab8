# Experts over 2 nodes, layers over 8 such pairs, each dense layer over 4 GPUs.
GPUS=128 PP=8
# Megatron asks for it where tensor parallelism is on, before Blackwell.
ENVIRONMENT=(CUDA_DEVICE_MAX_CONNECTIONS=1)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 4 --sequence-parallel
    --pipeline-model-parallel-size 8
    --expert-model-parallel-size 16 --expert-tensor-parallel-size 1
)
