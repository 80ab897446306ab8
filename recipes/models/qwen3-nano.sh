# Qwen3's routing at a size for a laptop: 8 experts, top-4, 4 layers.
#
# Fits anything: LAYOUT=ep2 on 2 GPUs or none. The schedule is nobody's; it trains.
VOCAB=256
MODEL_ARGS=(
    --ep-preset qwen3-nano
)
TRAIN_ARGS=(
    --micro-batch-size 2 --global-batch-size 8 --train-iters 200
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 10
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
