# One expert of each layer on a GPU: a layer of 32 experts is twice on 8 nodes.
GPUS=64
PARALLEL_ARGS=(
    --expert-model-parallel-size 64 --expert-tensor-parallel-size 1
)
