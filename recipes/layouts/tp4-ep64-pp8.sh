# Experts over 8 nodes, layers over 8 times 8 nodes, each dense layer over 4 GPUs.
GPUS=512 PP=8
# Megatron asks for it where tensor parallelism is on, before Blackwell.
ENVIRONMENT=(CUDA_DEVICE_MAX_CONNECTIONS=1)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 4 --sequence-parallel
    --pipeline-model-parallel-size 8
    --expert-model-parallel-size 64 --expert-tensor-parallel-size 1
)
