# Half a node: pairs of GPUs share each dense layer, experts lie over 4, each whole.
GPUS=4
# Megatron asks for it where tensor parallelism is on, before Blackwell.
ENVIRONMENT=(CUDA_DEVICE_MAX_CONNECTIONS=1)
PARALLEL_ARGS=(
    --tensor-model-parallel-size 2 --sequence-parallel
    --expert-model-parallel-size 4 --expert-tensor-parallel-size 1
)
