# One node: pairs of GPUs share each dense layer, experts lie over 8, each whole.
GPUS=8
# Megatron asks for it where tensor parallelism is on, before Blackwell.
ENVIRONMENT=(CUDA_DEVICE_MAX_CONNECTIONS=1)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 --sequence-parallel
    --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
)
